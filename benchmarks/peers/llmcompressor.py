"""Quantise a model with llm-compressor and record its time, memory and loss.

Stand-alone: run it with the python of an environment that holds `llmcompressor` and a CPU build of torch.

    python llmcompressor.py --model DIR --calib calib.jsonl --eval eval.jsonl \
        --method gptq --bits 4 --group-size 64 --nsamples 64 --seqlen 256 --json out.json

Windows: every document ("text" of a jsonl line) is preceded by the BOS token, all documents are joined
and the stream is cut into windows of equal length. Calibration takes the first `--nsamples` windows of
`--seqlen` tokens, evaluation the first `--eval-windows` windows of 256 tokens; the loss of a window is its
mean next-token loss in float32. Weights only, asymmetric groups, `lm_head` left alone, library defaults
otherwise. `seconds` and `rss_rise_bytes` cover the call of `oneshot` alone, so run it on an idle machine
and keep the least of a few runs. Without `--eval` the losses are null.

Calibration sees the windows in file order, or shuffled by `--seed`. The order changes nothing but the
rounding of sums, yet on a small model that alone moves GPTQ's loss: compare over a few seeds.
"""

import argparse
import gc
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

# This file carries the library's name: keep its folder off the import path, or it would import itself.
sys.path.remove(str(Path(__file__).resolve().parent))

import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

THREADS = 2
EVAL_SEQLEN = 256


def load_model(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def load_windows(tokenizer: PreTrainedTokenizerBase, path: Path, seqlen: int, count: int) -> Tensor:
    """The first `count` windows of `seqlen` tokens of a jsonl file, one per row."""
    ids: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            if len(ids) >= count * seqlen:
                return torch.tensor(ids[: count * seqlen]).view(count, seqlen)
    raise SystemExit(f"{path}: {len(ids)} tokens, fewer than {count} windows of {seqlen}")


@torch.inference_mode()
def evaluate(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """Mean next-token loss of each window."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        losses.append(cross_entropy(logits[:-1].float(), window[1:]).item())
    return losses


def build_recipe(method: str, bits: int, group_size: int) -> list[Modifier]:
    weights = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    options: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**options)]
    if method == "awq":  # AWQ only rescales; the modifier after it rounds
        return [AWQModifier(), QuantizationModifier(**options)]
    return [QuantizationModifier(**options)]


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def compress(model: PreTrainedModel, windows: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Quantise `model` in place; returns the time and memory that took."""
    recipe = build_recipe(args.method, args.bits, args.group_size)
    inputs: dict[str, Any] = {}
    if args.method != "rtn":  # rounding to nearest sees no data
        inputs["dataset"] = DataLoader([{"input_ids": window} for window in windows])
    gc.collect()
    loading_peak = peak_rss()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the current size
    rss = current_rss()
    start = time.perf_counter()
    oneshot(model=model, recipe=recipe, **inputs)
    seconds = time.perf_counter() - start
    peak = peak_rss()
    return {
        "seconds": seconds,
        "peak_rss_bytes": max(loading_peak, peak),
        "rss_rise_bytes": max(peak - rss, 0),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the Hugging Face model")
    parser.add_argument("--calib", required=True, type=Path, help="calibration documents, jsonl")
    parser.add_argument("--eval", type=Path, help="evaluation documents, jsonl")
    parser.add_argument("--method", required=True, choices=["gptq", "awq", "rtn"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--seed", type=int, help="shuffles the calibration windows")
    parser.add_argument("--eval-windows", type=int, default=200)
    parser.add_argument("--json", required=True, type=Path, help="where the result goes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(THREADS)
    if not torch.accelerator.is_available():
        # AWQ pins its cached activations, which crashes without an accelerator: switch pinning off.
        torch.Tensor.pin_memory = lambda self, *_: self

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = load_windows(tokenizer, args.calib, args.seqlen, args.nsamples)
    if args.seed is not None:
        order = torch.randperm(args.nsamples, generator=torch.Generator().manual_seed(args.seed))
        calibration = calibration[order]
    model = load_model(args.model)
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"method": args.method, "bits": args.bits, "group_size": args.group_size}
    result |= compress(model, calibration, args)
    print(
        f"load before {load:.2f}, {result['seconds']:.2f} s, "
        f"peak RSS {result['peak_rss_bytes'] / 2**20:.0f} MiB (+{result['rss_rise_bytes'] / 2**20:.0f} MiB)"
    )

    result |= dict.fromkeys(["dense_loss", "loss", "rise", "window_losses", "dense_window_losses"])
    if args.eval is not None:
        # The dense model is measured last, on a fresh copy, so that it does not weigh on the peak above.
        windows = load_windows(tokenizer, args.eval, EVAL_SEQLEN, args.eval_windows)
        losses = evaluate(model, windows)
        dense_losses = evaluate(load_model(args.model), windows)
        result |= {
            "dense_loss": mean(dense_losses),
            "loss": mean(losses),
            "rise": mean(losses) - mean(dense_losses),
            "window_losses": losses,
            "dense_window_losses": dense_losses,
        }
        print(f"loss {result['dense_loss']:.4f} -> {result['loss']:.4f} (+{result['rise']:.4f})")

    modules = (llmcompressor, compressed_tensors, torch, transformers)
    result["versions"] = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
