"""Sparse products on a CPU beside dense ones, in one run, as times and ratios.

    python benchmarks/sparse_kernels.py [--size 4096] [--threads N] [--seconds 0.4] [--part groups|bitmask]

N = K = --size. Weights go round more than a gigabyte, so that no cache has them. Times are medians of single calls in
milliseconds. What is dense runs on the same machine in the same minute: bfloat16 through torch, integers through the
compiled kernels for groups of 128.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import machine, markdown, save
from cpu_kernels import clock, copies, packed
from torch.nn.functional import linear

from trifold.core.canonical import Canonical, Dense, Quantized, Sparse
from trifold.core.pattern import Pattern
from trifold.core.scheme import Scheme
from trifold.formats import FORMATS, format_for
from trifold.kernels.dispatch import resolve
from trifold.kernels.op import Tensors
from trifold.kernels.weight_only.cpu import Compiled as Dense4

ROTATION = 1.1e9  # bytes
TOKENS = (1, 4, 16)


def sparse(size: int, pattern: str, share: float, scheme: Scheme | None) -> tuple[Tensors, dict[str, Any]]:
    """Survivors at random, about 1 - share of all: stored tensors and spec. scheme: None for bfloat16."""
    if pattern == "2:4":
        mask = Pattern.parse(pattern).mask(torch.rand(size, size), share, "matrix")
    else:
        width = 1 if pattern == "unstructured" else int(pattern[2:])
        mask = (torch.rand(size, size // width) >= share).repeat_interleave(width, 1)
    values: Canonical = Dense(torch.randn(size, size).bfloat16())
    if scheme is not None:
        codes = torch.randint(0, 2**scheme.bits, (size, size), dtype=torch.uint8)
        shape = scheme.scale_shape(size, size)
        zero = None if scheme.symmetric else torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)
        values = Quantized(codes, torch.full(shape, 0.01, dtype=torch.bfloat16), zero, scheme)
    weight = Sparse(values, mask, pattern).normalized()
    form = FORMATS.get(format_for(weight))
    return form.pack(weight), form.describe(weight)


def times(tensors: Tensors, spec: dict[str, Any], dtype: torch.dtype, seconds: float) -> tuple[str, dict[str, float]]:
    """The op that the dispatch chooses, and its milliseconds by number of tokens."""
    op = resolve(spec, dtype, torch.device("cpu"))
    weights = copies(op.prepare(tensors, spec))
    xs = [torch.randn(tokens, spec["shape"][1]).to(dtype) for tokens in TOKENS]
    return op.name, {str(len(x)): clock(lambda w, x: op.run(x, w, spec, None), weights, x, seconds) for x in xs}


def groups(size: int, seconds: float, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    found = {}
    for words, symmetric in (("", True), (" asymmetric", False)):
        dense = packed(size, bits=4, group_size=128, symmetric=symmetric)
        found[f"W4 g128{words}"] = times(*dense, dtype, seconds)[1]
        for group in (32, 16):
            made = sparse(size, f"1x{group}", 0.5, Scheme(4, group, symmetric))
            found[f"W4S50 g{group}{words}"] = times(*made, dtype, seconds)[1]
    return found


def bitmaps(size: int, seconds: float, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    count = int(ROTATION / (size * size * dtype.itemsize)) + 1
    weights = [torch.full((size, size), 0.01, dtype=dtype) for _ in range(count)]
    xs = [torch.randn(tokens, size).to(dtype) for tokens in TOKENS]
    found = {"bf16 linear": {str(len(x)): clock(lambda w, x: linear(x, w), weights, x, seconds) for x in xs}}
    for share in (0.5, 0.7, 0.9):
        found[f"bitmask bf16 {share:.0%}"] = times(*sparse(size, "unstructured", share, None), dtype, seconds)[1]
    int4 = Scheme(4, 128)
    found["bitmask int4 g128 50%"] = times(*sparse(size, "unstructured", 0.5, int4), dtype, seconds)[1]
    found["2:4 bf16"] = times(*sparse(size, "2:4", 0.5, None), dtype, seconds)[1]
    found["2:4 int4 g128"] = times(*sparse(size, "2:4", 0.5, int4), dtype, seconds)[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each figure")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(bitmaps(args.size, args.seconds, torch.bfloat16))


if __name__ == "__main__":
    main()
