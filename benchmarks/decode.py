"""Decoding of a random model of TinyLlama's shape, packed and dense in bfloat16, in one run.

    python benchmarks/decode.py [--folder DIR] [--bits 4] [--layers 22] [--threads N]

Hidden size 2048, 5632 inside the MLP, 22 blocks, a vocabulary of 32000 with an untied head that stays dense. Round to
nearest with the rest as the preset has it: only speed and memory are of interest. Loading runs in a process of its
own, whose peak beyond the imports is compared with the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, markdown, save

LOAD = """
import json, re, sys, trifold, trifold.compress.integration.quantizer, transformers.models.llama.modeling_llama, torch
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = trifold.load(sys.argv[1])
loaded = status("VmHWM") - before
with torch.no_grad():
    model(input_ids=torch.tensor([[1, 2, 3]]))
print(json.dumps({"load": loaded, "load_and_first_token": status("VmHWM") - before}))
"""


def make(folder: Path, layers: int) -> None:
    """The dense model; all linears of a block shape share one random draw, so that it is made quickly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    drawn: dict[torch.Size, torch.Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            if parameter.shape not in drawn:
                drawn[parameter.shape] = 0.02 * torch.randn(parameter.shape, dtype=torch.bfloat16)
            parameter.copy_(drawn[parameter.shape])
    model.save_pretrained(folder)


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the two models are made, or lie already")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--prepare", action="store_true", help="make the models and stop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        dense, packed = folder / "dense", folder / f"w{args.bits}"
        if not dense.exists():
            make(dense, args.layers)
        trifold = (sys.executable, "-m", "trifold")
        if not packed.exists():
            run(
                *trifold,
                "compress",
                dense,
                "-r",
                f"w{args.bits}a16-rtn",
                "-o",
                packed,
                "--set",
                "ranges=minmax",
                "--quiet",
            )
        if args.prepare:
            return
        memory = json.loads(run(sys.executable, "-c", LOAD, packed))
        size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        options = ("--batch-size", 1, "--batch-size", 4, "--batch-size", 16, "--prompt-tokens", 64, "--new-tokens", 16)
        result = json.loads(run(*trifold, "bench", packed, "--baseline", dense, *options, "--json", "-"))
    ours, theirs = (result["models"][str(model)] for model in (packed, dense))
    rows = [
        [
            a["batch_size"],
            *(f"{x[field]:.1f}" for field in ("prefill_tokens_per_s", "decode_tokens_per_s") for x in (a, b)),
            f"{a['decode_tokens_per_s'] / b['decode_tokens_per_s']:.2f}",
        ]
        for a, b in zip(ours["speeds"], theirs["speeds"], strict=True)
    ]
    here = machine()
    head = ("batch", "prefill", "prefill, dense", "decoding", "decoding, dense", "decoding, ratio")
    text = (
        f"# Decoding\n\nA random model of TinyLlama's shape, {args.layers} blocks, W{args.bits}, {result['threads']} "
        f"threads, {here['cpu']} ({here['capability']}). Tokens per second.\n\n{markdown(head, rows)}\n"
        f"Weights: {ours['weight_bytes'] / 1e9:.3f} GB packed, {theirs['weight_bytes'] / 1e9:.3f} GB dense. "
        f"Loading the packed checkpoint of {size / 1e9:.3f} GB raises memory by {memory['load'] / 1e9:.3f} GB at its "
        f"peak, with the first token by {memory['load_and_first_token'] / 1e9:.3f} GB.\n"
    )
    save("decode", {"machine": here, "memory": {**memory, "checkpoint": size}, **result}, text)
    print(text)


if __name__ == "__main__":
    main()
