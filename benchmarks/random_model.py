"""A model of random weights in the shape of a real one, written shard by shard: for what depends on sizes alone.

python benchmarks/random_model.py OUT --layers 22
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def write(folder: Path, layers: int, shard_bytes: int = 500_000_000, seed: int = 0) -> None:
    """Random bfloat16 weights of TinyLlama's shape; never more than one shard is in memory."""
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16", **TINYLLAMA)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    files: list[dict[str, torch.Tensor]] = []
    weight_map, total, held = {}, 0, shard_bytes
    names = iter([*shapes, None])
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if shard:
            file = f"model-{len(files):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            files.append({})
            shard.clear()

    for name in names:
        size = 0 if name is None else 2 * shapes[name].numel()
        if name is None or (shard and held + size > shard_bytes):
            flush()
            held = 0
        if name is None:
            break
        values = torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16)
        shard[name] = values.mul_(0.02) if len(shapes[name]) > 1 else values.mul_(0.1).add_(1)
        held += size
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--layers", default=22, show_default=True)
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="Folder whose tokenizer to copy.")
def main(output: Path, layers: int, tokenizer: Path | None) -> None:
    """Write the model to OUTPUT."""
    write(output, layers)
    for file in tokenizer.glob("tokenizer*") if tokenizer else ():
        shutil.copy(file, output)


if __name__ == "__main__":
    main()
