"""Checkpoints made by other tools: what their own loaders compute from them, and what Trifold does.

    python benchmarks/peers/checkpoints.py make OUT          # the Python of GPTQModel, and that of llm-compressor
    python benchmarks/peers/checkpoints.py read OUT          # the same, of what lies there already
    python benchmarks/peers/checkpoints.py compare OUT       # the Python of Trifold

`make` compresses a model (`--model`, by default the one that comes with Trifold) in each way that the tool installed
there knows, writes each checkpoint to a folder of OUT, and reads it. `read` loads what lies in OUT with its own loader
(compressed-tensors with transformers, GPTQ and AWQ with GPTQModel), exports of Trifold too, and keeps, beside the
weights, `peer/reference.safetensors`: the logits of 64 tokens, and of GPTQModel also the weights as its kernels
dequantise them and the float32 logits of a plain model with these weights, since its kernels compute in 16 bits only.
`compare` loads each checkpoint with `trifold.load` and prints the largest differences, of the kernels that are
dispatched and of the naive ones. Where activations are rounded to integers a difference in the last bit of a sum sends
some to another code, so only the naive kernels, which sum as the tool does, are bounded there. `--record` writes it
to benchmarks/results/peers.json and .md.

GPTQModel wants GPTQMODEL_CPU_WORKERS=2 on a machine with two cores; TORCHDYNAMO_DISABLE=1 saves it compiling.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
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
PACKAGES = ("llmcompressor", "gptqmodel", "compressed_tensors", "transformers", "torch")
NAIVE = "weight_only.naive,rounded_input.naive"

GPTQMODEL = {
    "gptq-w4-g32": {"bits": 4, "group_size": 32},
    "gptq-w4-g32-actorder": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq-w4-g64-asym": {"bits": 4, "group_size": 64, "sym": False},
    "gptq_v2-w4-g64-asym": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq_v2-w3-g32": {"bits": 3, "group_size": 32, "format": "gptq_v2"},
    "gptq-w3-g32-asym-actorder": {"bits": 3, "group_size": 32, "sym": False, "desc_act": True},
    "gptq-w2-g32": {"bits": 2, "group_size": 32},
    "gptq-w8-channel": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "awq-w4-g32": {"bits": 4, "group_size": 32, "sym": False, "method": "awq", "format": "gemm"},
}
LLM_COMPRESSOR = {  # name: (modifier, scheme)
    "ct-gptq-w4a16": ("GPTQ", "W4A16"),
    "ct-awq-w4a16-asym": ("AWQ", "W4A16_ASYM"),
    "ct-w8a16": ("round", "W8A16"),
    "ct-w8a8": ("GPTQ", "W8A8"),
    "ct-fp8-dynamic": ("round", "FP8_DYNAMIC"),
    "ct-fp8-static": ("round", "FP8"),
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
    packages = [name for name in PACKAGES if find_spec(name)]
    known = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    (folder / "peer" / "read.json").write_text(json.dumps({"tool": tool, "versions": known}) + "\n")


def with_gptqmodel(model: str, ids: list[list[int]], out: Path, names: list[str]) -> Iterator[str]:
    from gptqmodel import GPTQModel, QuantizeConfig

    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in ids]
    for name in names:
        settings: dict[str, Any] = {"sym": True, "desc_act": False, "offload_to_disk": False, **GPTQMODEL[name]}
        quantised = GPTQModel.load(model, QuantizeConfig(**settings), device="cpu")
        quantised.quantize(copy.deepcopy(examples), batch_size=4)
        quantised.save(str(out / name))
        yield name


def gptqmodel_reads(folder: Path) -> dict[str, torch.Tensor]:
    """What is kept of a checkpoint of GPTQ or AWQ in one file, read by GPTQModel."""
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    backend = BACKEND.AWQ_TORCH if config.quantization_config["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    own = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    kept = {"logits16": logits_of(own)}
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    layers = {name: module for name, module in own.named_modules() if hasattr(module, "qweight")}
    for key, parameter in plain.named_parameters():
        layer = layers.get(key.removesuffix(".weight"))
        parameter.data = stored[key].float() if layer is None else weight_of(layer)
        if layer is not None:
            kept[key] = parameter.data.clone()
    plain.tie_weights()
    return {**kept, "logits": logits_of(plain.eval())}


@torch.inference_mode()
def weight_of(layer: Any) -> torch.Tensor:
    """(out, in) float32, by the kernel's own dequantiser, whose scales are made float32 so that nothing is rounded."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    layer.scales = layer.scales.float()
    layer.clear_weight_cache()
    if hasattr(layer, "g_idx") and hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight().T.contiguous()
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).T.contiguous()


def with_llm_compressor(model: str, ids: list[list[int]], out: Path, names: list[str]) -> Iterator[str]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

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
        yield name


def transformers_reads(folder: Path) -> dict[str, torch.Tensor]:
    """What is kept of a checkpoint of compressed-tensors, read by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    groups = config.quantization_config["config_groups"].values()
    if not all(group["weights"]["symmetric"] for group in groups):  # else zero-points do not load
        config.quantization_config["dequantize"] = True
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    return {"logits": logits_of(model)}


READERS = {
    "gptqmodel": (gptqmodel_reads, ("gptq", "awq")),
    "compressed_tensors": (transformers_reads, ("compressed-tensors",)),
}


def read(args: argparse.Namespace) -> None:
    """Let each checkpoint be read by what its kind is read by, if this Python has it."""
    for path in sorted(args.out.glob("*/config.json")):
        method = json.loads(path.read_text())["quantization_config"]["quant_method"]
        for module, (reads, methods) in READERS.items():
            if method in methods and find_spec(module) and not (path.parent / "peer").exists():
                keep(path.parent, module, reads(path.parent))
                print(f"read {path.parent.name}", flush=True)


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
    read(args)


def compare(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    import trifold
    from trifold.compress.packed_folder import open_packed
    from trifold.formats import rounds_input

    rows: dict[str, Any] = {}
    for folder in sorted(path.parent.parent for path in args.out.glob("*/peer/reference.safetensors")):
        kept, packed = load_file(folder / "peer" / "reference.safetensors"), open_packed(folder)
        ours = logits_of(trifold.load(folder, dtype=torch.float32))
        os.environ["TRIFOLD_KERNEL"] = NAIVE
        naive = logits_of(trifold.load(folder, dtype=torch.float32))
        del os.environ["TRIFOLD_KERNEL"]
        row = {key: float((each - kept["logits"]).abs().max()) for key, each in (("logits", ours), ("naive", naive))}
        if "logits16" in kept:
            row["logits16"] = float((ours - kept["logits16"]).abs().max())
            weights = {name: packed.weight(name).dequantize() for name in packed.modules}
            row["weights"] = max(
                float((weight - kept[f"{name}.weight"]).abs().max()) for name, weight in weights.items()
            )
        rounds = any(rounds_input(spec) and "grid" not in spec["input"] for spec in packed.modules.values())
        rows[folder.name] = {
            **row,
            "rounds": rounds,
            "layers": len(packed.modules),
            **json.loads((folder / "peer" / "read.json").read_text()),
        }
        print(f"{folder.name:28s}" + "  ".join(f"{k} {v:.1e}" for k, v in row.items() if isinstance(v, float)))
    if args.record:
        record(rows)
    for name, row in rows.items():
        bounded = ["naive"] if row["rounds"] else ["naive", "logits"]
        if any(row[key] > EXACT for key in bounded):
            raise SystemExit(f"{name}: logits differ by more than {EXACT}")


def record(rows: dict[str, Any]) -> None:
    results = ROOT / "benchmarks" / "results"
    (results / "peers.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    head = ("checkpoint", "read by", "float32 logits", "of naive kernels", "its 16-bit logits", "weights")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        cells = [f"{row[key]:.1e}" if key in row else "" for key in ("logits", "naive", "logits16", "weights")]
        lines.append(f"| {name} | {row['tool']} {row['versions'][row['tool']]} | {' | '.join(cells)} |")
    (results / "peers.md").write_text("\n".join(lines) + "\n")


MODES = {"make": make, "read": read, "compare": compare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=str(ROOT / "trifold" / "demo" / "model"))
    parser.add_argument("--text", type=Path, default=ROOT / "trifold" / "demo" / "text" / "calibration.jsonl")
    parser.add_argument("--only", nargs="*", help="names of checkpoints to make")
    parser.add_argument("--record", action="store_true", help="write the comparison to benchmarks/results")
    args = parser.parse_args()
    args.out, args.text = args.out.resolve(), args.text.resolve()
    args.model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)  # where tools write their logs
    MODES[args.mode](args)


if __name__ == "__main__":
    main()
