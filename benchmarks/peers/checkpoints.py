"""Checkpoints made by other tools: what their own loaders compute from them, and what Trifold does.

    python benchmarks/peers/checkpoints.py make OUT          # the Python of GPTQModel, and that of llm-compressor
    python benchmarks/peers/checkpoints.py compare OUT       # the Python of Trifold

`make` compresses a model (`--model`, by default the one that comes with Trifold) in each way that the tool installed
there knows, writes each checkpoint to a folder of OUT, loads it again with the tool's own loader and keeps, beside the
weights, `peer/reference.safetensors`: the logits of 64 tokens, and of GPTQModel also the weights as its kernels
dequantise them and the float32 logits of a plain model with these weights, since its kernels compute in 16 bits only.
`compare` loads each checkpoint with `trifold.load` and prints the largest differences; `--record` writes them to
benchmarks/results/peers.json and .md.

GPTQModel wants GPTQMODEL_CPU_WORKERS=2 on a machine with two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
if str(Path(__file__).resolve().parent) in sys.path:  # a file there has the name of a tool
    sys.path.remove(str(Path(__file__).resolve().parent))
PROMPT = torch.arange(2, 66).reshape(2, 32)
EXACT = 1e-3  # of float32 logits

GPTQMODEL = {
    "gptq-w4-g32": {"bits": 4, "group_size": 32},
    "gptq-w4-g32-actorder": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq-w4-g64-asym": {"bits": 4, "group_size": 64, "sym": False},
    "gptq_v2-w4-g64-asym": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq_v2-w3-g32": {"bits": 3, "group_size": 32, "format": "gptq_v2"},
    "gptq-w3-g32-asym-actorder": {"bits": 3, "group_size": 32, "sym": False, "desc_act": True},
    "gptq-w2-g32": {"bits": 2, "group_size": 32},
    "gptq-w8-channel": {"bits": 8, "group_size": -1},
    "awq-w4-g32": {"bits": 4, "group_size": 32, "sym": False, "method": "awq", "format": "gemm"},
}
LLM_COMPRESSOR = {  # name: (modifier, scheme)
    "ct-gptq-w4a16": ("GPTQ", "W4A16"),
    "ct-awq-w4a16-asym": ("AWQ", "W4A16_ASYM"),
    "ct-w8a16": ("round", "W8A16"),
    "ct-w8a8": ("GPTQ", "W8A8"),
    "ct-fp8-dynamic": ("round", "FP8_DYNAMIC"),
    "ct-fp8-static": ("round", "FP8"),
    "ct-fp8-block": ("round", "FP8_BLOCK"),
}


def calibration(model: str, text: Path, windows: int = 32, seqlen: int = 128) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(model), list[int]()
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]
    return [ids[start : start + seqlen] for start in range(0, windows * seqlen, seqlen)]


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits.float().contiguous()


def keep(folder: Path, tool: str, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "peer").mkdir()
    save_file(tensors, folder / "peer" / "reference.safetensors")
    packages = [tool, "transformers", "torch", *(["compressed-tensors"] if tool == "llmcompressor" else [])]
    known = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    (folder / "peer" / "made.json").write_text(json.dumps({"tool": tool, "versions": known}) + "\n")


def with_gptqmodel(model: str, ids: list[list[int]], out: Path, names: list[str]) -> Iterator[str]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM

    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in ids]
    for name in names:
        settings: dict[str, Any] = {"sym": True, "desc_act": False, "offload_to_disk": False, **GPTQMODEL[name]}
        quantised = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu")
        quantised.quantize(copy.deepcopy(examples), batch_size=4)
        quantised.save(str(out / name))
        backend = BACKEND.AWQ_TORCH if settings.get("method") == "awq" else BACKEND.GPTQ_TORCH
        own = GPTQModel.load(str(out / name), device="cpu", backend=backend, dtype=torch.float16).model
        kept = {"logits16": logits_of(own)}
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        state = own.state_dict()
        layers = {n: m for n, m in own.named_modules() if hasattr(m, "qweight")}
        for key, parameter in plain.named_parameters():  # AWQ changes the norms too
            layer = layers.get(key.removesuffix(".weight"))
            parameter.data = state[key].float() if layer is None else weight_of(layer)
            if layer is not None:
                kept[key] = parameter.data.clone()
        plain.tie_weights()
        kept["logits"] = logits_of(plain)
        keep(out / name, "gptqmodel", kept)
        yield name


@torch.inference_mode()
def weight_of(layer: Any) -> torch.Tensor:
    """(out, in) float32, by the kernel's own dequantiser where it says it, else by the product with the identity."""
    if hasattr(layer, "g_idx") and hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight().T.float().contiguous()
    return layer(torch.eye(layer.in_features, dtype=torch.float16)).T.float().contiguous()


def with_llm_compressor(model: str, ids: list[list[int]], out: Path, names: list[str]) -> Iterator[str]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoConfig, AutoModelForCausalLM

    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # AWQ pins memory, which needs an accelerator
    for name in names:
        kind, scheme = LLM_COMPRESSOR[name]
        options = {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"]}
        recipe = {
            "GPTQ": lambda o=options: [GPTQModifier(**o)],
            "AWQ": lambda o=options: [AWQModifier(), QuantizationModifier(**o)],
            "round": lambda o=options: [QuantizationModifier(**o)],
        }[kind]()
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        data = DataLoader([{"input_ids": torch.tensor(window)} for window in ids])
        oneshot(model=dense, recipe=recipe, dataset=data)
        dense.save_pretrained(out / name, save_compressed=True)
        config = AutoConfig.from_pretrained(out / name)
        weights = next(iter(config.quantization_config["config_groups"].values()))["weights"]
        config.quantization_config["dequantize"] = not weights["symmetric"]  # else zero-points do not load
        own, info = AutoModelForCausalLM.from_pretrained(
            out / name, config=config, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
        keep(out / name, "llmcompressor", {"logits": logits_of(own)})
        yield name


def make(args: argparse.Namespace) -> None:
    tools = {"gptqmodel": (with_gptqmodel, GPTQMODEL), "llmcompressor": (with_llm_compressor, LLM_COMPRESSOR)}
    found = [tool for tool in tools if find_spec(tool)]
    if not found:
        raise SystemExit("this Python has neither gptqmodel nor llmcompressor")
    ids = calibration(args.model, args.text)
    for tool in found:
        run, known = tools[tool]
        names = [name for name in known if not args.only or name in args.only]
        for name in run(args.model, ids, args.out, [name for name in names if not (args.out / name).exists()]):
            print(f"made {name}", flush=True)


def compare(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    import trifold
    from trifold.compress.packed_folder import open_packed

    rows = {}
    for folder in sorted(path.parent.parent for path in args.out.glob("*/peer/reference.safetensors")):
        kept, packed = load_file(folder / "peer" / "reference.safetensors"), open_packed(folder)
        with torch.inference_mode():
            model = trifold.load(folder, dtype=torch.float32)
            ours = logits_of(model)
        row = {"logits": float((ours - kept["logits"]).abs().max()), "layers": len(packed.modules)}
        if "logits16" in kept:
            row["logits16"] = float((ours - kept["logits16"]).abs().max())
            weights = {name: packed.weight(name).dequantize() for name in packed.modules}
            row["weights"] = max(
                float((weight - kept[f"{name}.weight"]).abs().max()) for name, weight in weights.items()
            )
        rows[folder.name] = {**row, **json.loads((folder / "peer" / "made.json").read_text())}
        print(f"{folder.name:28s}" + "  ".join(f"{k} {v:.1e}" for k, v in row.items() if isinstance(v, float)))
    if args.record:
        record(rows)
    worst = max(rows, key=lambda name: rows[name]["logits"])
    if rows[worst]["logits"] > EXACT:
        raise SystemExit(f"{worst}: logits differ by {rows[worst]['logits']:.1e}, more than {EXACT}")


def record(rows: dict[str, Any]) -> None:
    results = ROOT / "benchmarks" / "results"
    (results / "peers.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    lines = [
        "| checkpoint | made by | float32 logits differ by | 16-bit logits differ by | weights differ by |",
        "|" + "---|" * 5,
    ]
    for name, row in rows.items():
        cells = [f"{row[key]:.1e}" if key in row else "" for key in ("logits", "logits16", "weights")]
        lines.append(f"| {name} | {row['tool']} {row['versions'][row['tool']]} | {' | '.join(cells)} |")
    (results / "peers.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["make", "compare"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=str(ROOT / "trifold" / "demo" / "model"))
    parser.add_argument("--text", type=Path, default=ROOT / "trifold" / "demo" / "text" / "calibration.jsonl")
    parser.add_argument("--only", nargs="*", help="names of checkpoints to make")
    parser.add_argument("--record", action="store_true", help="write the comparison to benchmarks/results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (make if args.mode == "make" else compare)(args)


if __name__ == "__main__":
    main()
