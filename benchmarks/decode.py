"""Decoding of a random model of TinyLlama's shape, packed and dense in bfloat16, in one run.

    python benchmarks/decode.py [--folder DIR] [--keep 0.6] [--bits 4 [--symmetric]] [--against-w4] [--layers 22]

Hidden size 2048, 5632 inside the MLP, 22 blocks, a vocabulary of 32000 with an untied head that stays dense. The
packed checkpoint has random codes in groups of 128, or with `--keep` random factors of that share of the bytes, in
bfloat16 or of `--bits`, since only speed and memory are of interest. Loading runs in a process of its own, whose peak
beyond the imports is compared with the size of the checkpoint.
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
from random_model import TINYLLAMA

from trifold.core.canonical import Canonical, Chain, Dense, Quantized, Split
from trifold.core.scheme import Scheme

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


def make(folder: Path, layers: int, bits: int | None, symmetric: bool = False, keep: float | None = None) -> None:
    """A random model, dense or with packed blocks."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import trifold.quantizers  # noqa: F401 - registers what rounds factors
    from trifold.compress.checkpoint import FORMAT_VERSION, QUANT_METHOD
    from trifold.compress.integration.modules import replace_modules
    from trifold.formats import describe, pack
    from trifold.lowrank import ReducedRank

    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16", **TINYLLAMA)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    scheme = {"bits": bits, "group_size": 128, "symmetric": symmetric, "scale_dtype": "bfloat16"}
    linears = {n: m for n, m in model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)}
    specs = {name: {"format": "int", **scheme, "shape": list(m.weight.shape)} for name, m in linears.items()}
    modules, packed = specs if bits and not keep else {}, {}
    if keep:
        method, rounded = ReducedRank(keep=keep), Scheme(bits, 128, symmetric) if bits else None
        for name, module in linears.items():
            canonical = _realised(method.sketch((module.out_features, module.in_features), rounded))
            modules[name] = describe(canonical)
            packed.update({f"{name}.{leaf}": tensor for leaf, tensor in pack(canonical).items()})
    replace_modules(model, modules)
    state = model.state_dict()
    tensors = {name: packed[name] if name in packed else _random(name, tensor) for name, tensor in state.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = config.to_dict()
    if modules:
        written["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "modules": modules,
        }
    (folder / "config.json").write_text(json.dumps(written, default=str))


def _realised(canonical: Canonical) -> Canonical:
    """A sketch with random numbers in it."""
    match canonical:
        case Dense(values):
            return Dense(0.02 * torch.randn(values.shape, dtype=values.dtype))
        case Quantized(codes, scale, zero, scheme):
            some = torch.randint(2**scheme.bits, codes.shape, dtype=torch.uint8)
            middle = None if zero is None else torch.full(zero.shape, 2 ** (scheme.bits - 1), dtype=zero.dtype)
            return Quantized(some, torch.full(scale.shape, 0.005, dtype=scale.dtype), middle, scheme)
        case Chain(parts):
            return Chain(tuple(map(_realised, parts)))
        case Split(axis, index, parts):
            return Split(axis, index[torch.randperm(len(index))], tuple(map(_realised, parts)))
    return canonical


def _random(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, tensor.shape, dtype=torch.int32)
    if name.endswith("scale"):
        return torch.full(tensor.shape, 0.005, dtype=tensor.dtype)
    return (
        torch.ones_like(tensor, device="cpu")
        if tensor.dim() == 1
        else 0.02 * torch.randn(tensor.shape, dtype=tensor.dtype)
    )


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the two models are made, or lie already")
    parser.add_argument("--bits", type=int, help="of the weights, 4 by default, or of the factors")
    parser.add_argument("--symmetric", action="store_true", help="without zero-points")
    parser.add_argument("--keep", type=float, help="low rank instead: the share of bytes that factors keep")
    parser.add_argument("--against-w4", action="store_true", help="compare with 4 bits instead of with dense")
    parser.add_argument("--name", default="decode", help="Name of the files in benchmarks/results.")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--prepare", action="store_true", help="make the models and stop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        bits = args.bits or (None if args.keep else 4)
        parts = (args.keep and f"rank {args.keep:.0%}", bits and f"W{bits}", args.symmetric and "symmetric")
        label = " ".join(filter(None, parts))
        baseline = "W4" if args.against_w4 else "dense"
        base, packed = folder / baseline.lower(), folder / label.replace(" ", "").replace("%", "").lower()
        if not base.exists():
            make(base, args.layers, 4 if args.against_w4 else None)
        if not packed.exists():
            make(packed, args.layers, bits, args.symmetric, args.keep)
        trifold = (sys.executable, "-m", "trifold")
        if args.prepare:
            return
        memory = json.loads(run(sys.executable, "-c", LOAD, packed))
        size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        options = ("--batch-size", 1, "--batch-size", 4, "--batch-size", 16, "--prompt-tokens", 64, "--new-tokens", 16)
        result = json.loads(run(*trifold, "bench", packed, "--baseline", base, *options, "--json", "-"))
    ours, theirs = (result["models"][str(model)] for model in (packed, base))
    rows = [
        [
            a["batch_size"],
            *(f"{x[field]:.1f}" for field in ("prefill_tokens_per_s", "decode_tokens_per_s") for x in (a, b)),
            *(f"{a[field] / b[field]:.2f}" for field in ("prefill_tokens_per_s", "decode_tokens_per_s")),
        ]
        for a, b in zip(ours["speeds"], theirs["speeds"], strict=True)
    ]
    here = machine()
    columns = ("prefill", f"prefill, {baseline}", "decoding", f"decoding, {baseline}")
    head = ("batch", *columns, "prefill, ratio", "decoding, ratio")
    text = (
        f"# Decoding\n\nA random model of TinyLlama's shape, {args.layers} blocks, {label}, {result['threads']} "
        f"threads, {here['cpu']} ({here['capability']}). Tokens per second.\n\n{markdown(head, rows)}\n"
        f"Weights: {ours['weight_bytes'] / 1e9:.3f} GB packed, {theirs['weight_bytes'] / 1e9:.3f} GB {baseline} "
        f"({theirs['weight_bytes'] / ours['weight_bytes']:.2f} times as many). "
        f"Loading the packed checkpoint of {size / 1e9:.3f} GB raises memory by {memory['load'] / 1e9:.3f} GB at its "
        f"peak, with the first token by {memory['load_and_first_token'] / 1e9:.3f} GB.\n"
    )
    save(args.name, {"machine": here, "memory": {**memory, "checkpoint": size}, **result}, text)
    print(text)


if __name__ == "__main__":
    main()
