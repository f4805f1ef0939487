"""Packed products on a CPU beside torch's own, in one run, as times and ratios.

    python benchmarks/cpu_kernels.py [--size 4096] [--group 128] [--threads N] [--seconds 0.4] [--kernel NAME]

N = K = --size. "DRAM" goes round more than a gigabyte of weights, so that no cache has them; "cache" uses one weight
again and again. Times are the best of three medians of single calls, in milliseconds. --kernel: a compiled one by name,
else the best that this processor runs; results are named after it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, markdown, save
from torch.nn.functional import linear

from trifold.core.canonical import Quantized
from trifold.core.scheme import Scheme
from trifold.formats import FORMATS, format_for
from trifold.kernels.dispatch import TABLE, explain
from trifold.kernels.op import Op, Tensors

ROTATION = 1.1e9  # bytes
TOKENS = (1, 4, 16, 64, 256)
SCHEMES: dict[str, dict[str, Any]] = {
    "W2": {"bits": 2, "symmetric": True},
    "W3": {"bits": 3, "symmetric": True},
    "W4": {"bits": 4, "symmetric": True},
    "W4 asymmetric": {"bits": 4},
    "NF4": {"bits": 4, "grid": "nf4"},
    "W8 per channel": {"bits": 8, "symmetric": True, "group_size": "channel"},
}


def packed(size: int, **scheme: Any) -> tuple[Tensors, dict[str, Any]]:
    """Random codes of a scheme: stored tensors and spec."""
    made = Scheme(**scheme)
    codes = torch.randint(0, 2**made.bits, (size, size), dtype=torch.uint8)
    shape = made.scale_shape(size, size)
    zero = None if made.symmetric else torch.randint(0, 2**made.bits, shape, dtype=torch.uint8)
    weight = Quantized(codes, torch.full(shape, 0.01, dtype=torch.bfloat16), zero, made)
    form = FORMATS.get(format_for(weight))
    return form.pack(weight), form.describe(weight)


def clock(run: Callable[[Any, torch.Tensor], Any], weights: list[Any], x: torch.Tensor, seconds: float) -> float:
    """Median milliseconds of a call, weights in turn."""
    times: list[float] = []
    for weight in weights[:3]:
        run(weight, x)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 3:
        for weight in weights:
            start = time.perf_counter()
            run(weight, x)
            times.append(time.perf_counter() - start)
            if time.perf_counter() - begun > 2 * seconds and len(times) >= 3:
                break
    return statistics.median(times) * 1e3


def steady(run: Callable[[Any, torch.Tensor], Any], weights: list[Any], x: torch.Tensor, seconds: float) -> float:
    """The best of three medians, since other tenants of a machine disturb whole seconds."""
    return min(clock(run, weights, x, seconds / 3) for _ in range(3))


def copies(tensors: Tensors) -> list[Tensors]:
    size = sum(tensor.nbytes for tensor in tensors.values())
    return [{name: t.clone() for name, t in tensors.items()} for _ in range(max(2, int(ROTATION / size) + 1))]


def op_named(name: str) -> Op:
    return next(row.op for row in TABLE if row.op.name == name)


def measure_op(
    op: Op,
    size: int,
    scheme: dict[str, Any],
    xs: list[torch.Tensor],
    seconds: float,
    rounding: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Milliseconds in DRAM and in cache by number of tokens. rounding: of the activations."""
    tensors, spec = packed(size, **scheme)
    spec |= {"input": rounding} if rounding else {}
    reason = op.supports(spec, xs[0].dtype, torch.device("cpu"))
    if reason is not None:
        return {"reason": reason}
    calls = [op.bind(weight, spec) for weight in copies(op.prepare(tensors, spec))]
    return measure(lambda call, x: call(x, None), calls, xs, seconds)


def measure(run: Callable[[Any, torch.Tensor], Any], weights: list[Any], xs: list[torch.Tensor], seconds: float) -> Any:
    return {
        "dram": {str(len(x)): steady(run, weights, x, seconds) for x in xs},
        "cache": {str(len(x)): steady(run, weights[:1], x, seconds) for x in xs},
    }


def dense(size: int, dtype: torch.dtype, xs: list[torch.Tensor], seconds: float) -> Any:
    count = int(ROTATION / (size * size * dtype.itemsize)) + 1
    weights = [torch.full((size, size), 0.01, dtype=dtype) for _ in range(count)]
    return measure(lambda weight, x: linear(x, weight), weights, xs, seconds)


def ratios(results: dict[str, Any], ours: str) -> dict[str, float]:
    """How many times faster ours is, weights in DRAM."""

    def faster(other: str, mine: str, tokens: str) -> float:
        return float(results[other]["dram"][tokens] / results[mine]["dram"][tokens])

    found = {
        "M=1: W4 over torch's int4": faster("W4 torch_int4", f"W4 {ours}", "1"),
        "M=1: W4 over bf16 linear": faster("bf16 linear", f"W4 {ours}", "1"),
        "M=16: W4 over torch's int4": faster("W4 torch_int4", f"W4 {ours}", "16"),
        "M=16: W4 over bf16 linear": faster("bf16 linear", f"W4 {ours}", "16"),
        "M=64: W4 over bf16 linear": faster("bf16 linear", f"W4 {ours}", "64"),
        "M=256: W4 over bf16 linear": faster("bf16 linear", f"W4 {ours}", "256"),
        "M=1: W2 over W4": faster(f"W4 {ours}", f"W2 {ours}", "1"),
        "M=1: W8 over torch's int8": faster("W8 per channel torch_int8", f"W8 per channel {ours}", "1"),
        "M=16: W8 over torch's int8": faster("W8 per channel torch_int8", f"W8 per channel {ours}", "16"),
    }
    if "fp32 linear" in results:
        found["M=1: W4 over fp32 linear, fp32 activations"] = faster("fp32 linear", f"W4 fp32 {ours}", "1")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each figure")
    parser.add_argument("--kernel", help="such as weight_only.cpu_avx2")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    _, spec = packed(64, bits=4, group_size=32)
    op = op_named(args.kernel or explain(spec, torch.bfloat16, "cpu").op)
    ours = op.name.removeprefix("weight_only.")
    halves = [torch.randn(m, args.size).bfloat16() for m in TOKENS]
    floats = [torch.randn(m, args.size) for m in (1, 16)]
    results = {"bf16 linear": dense(args.size, torch.bfloat16, halves, args.seconds)}
    schemes = {name: {"group_size": args.group, **scheme} for name, scheme in SCHEMES.items()}
    for name, scheme in schemes.items():
        xs = halves if name == "W4" else [halves[0], halves[2]]
        results[f"{name} {ours}"] = measure_op(op, args.size, scheme, xs, args.seconds)
        other = {"W4": "torch_int4", "W8 per channel": "torch_int8"}.get(name)
        if other:
            taken = op_named(f"weight_only.{other}")
            results[f"{name} {other}"] = measure_op(taken, args.size, scheme, xs[:3], args.seconds)
    by_bytes = op_named(f"rounded_input.{ours}") if ours in ("cpu_amx", "cpu_avx512_bf16") else None
    if by_bytes:
        given = [halves[0], halves[2]]
        results[f"W4A8 {ours}"] = measure_op(by_bytes, args.size, schemes["W4"], given, args.seconds, {"bits": 8})
    results["fp32 linear"] = dense(args.size, torch.float32, floats, args.seconds)
    results[f"W4 fp32 {ours}"] = measure_op(op, args.size, schemes["W4"], floats, args.seconds)
    found = ratios(results, ours)
    columns = [str(m) for m in TOKENS]
    rows = [
        [name, place, *(f"{times[place][m]:.3f}" if m in times[place] else "" for m in columns)]
        for name, times in results.items()
        if "reason" not in times
        for place in ("dram", "cache")
    ]
    here = machine()
    text = (
        f"# CPU kernels\n\nN = K = {args.size}, groups of {args.group}, {here['threads']} threads, "
        f"{here['cpu']} ({here['capability']}), torch {torch.__version__}. "
        "Milliseconds by number of tokens M, best of three medians.\n\n"
        + markdown(["product", "weights in", *(f"M={m}" for m in columns)], rows)
        + "\nHow many times faster, weights in DRAM:\n\n"
        + markdown(["", "ratio"], [[name, f"{value:.2f}"] for name, value in found.items()])
    )
    save(
        ours.replace("cpu_", "cpu_kernels-"),
        {"machine": here, "arguments": vars(args), "milliseconds": results, "ratios": found},
        text,
    )
    print(text)


if __name__ == "__main__":
    main()
