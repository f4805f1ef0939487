"""Sparse products on a CPU beside dense ones, in one run, as times and ratios.

    python benchmarks/sparse_kernels.py [--size 4096] [--threads N] [--seconds 0.4] [--part groups|bitmaps]

N = K = --size. Weights go round more than a gigabyte, so that no cache has them. Times are the best of three medians of
single calls, in milliseconds. What is dense runs on the same machine in the same run: bfloat16 through torch, integers
through the compiled kernels for groups of 128.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import RESULTS, machine, markdown, save
from cpu_kernels import copies, packed, steady
from torch.nn.functional import linear

from trifold.core.canonical import Canonical, Dense, Quantized, Sparse
from trifold.core.pattern import Pattern
from trifold.core.scheme import Scheme
from trifold.formats import FORMATS, format_for
from trifold.kernels.dispatch import resolve
from trifold.kernels.op import Tensors

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


def times(name: str, weight: tuple[Tensors, dict[str, Any]], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """A row: the op that the dispatch chooses, its bytes of a weight, and milliseconds by number of tokens."""
    tensors, spec = weight
    op = resolve(spec, dtype, torch.device("cpu"))
    runtime = op.prepare(tensors, spec)
    bits = 8 * sum(t.nbytes for t in runtime.values()) / (spec["shape"][0] * spec["shape"][1])
    weights = copies(runtime)
    xs = [torch.randn(tokens, spec["shape"][1]).to(dtype) for tokens in TOKENS]
    found = {str(len(x)): steady(lambda w, x: op.run(x, w, spec, None), weights, x, seconds) for x in xs}
    return {"product": name, "op": op.name, "bits": bits, "ms": found}


def groups(size: int, seconds: float, dtype: torch.dtype) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Rows, and which of them to compare: the one that should be slower first."""
    rows, pairs = [], []
    for words, symmetric in (("", True), (" asymmetric", False)):
        rows.append(times(f"W4 g128{words}", packed(size, bits=4, group_size=128, symmetric=symmetric), dtype, seconds))
        for group in (32, 16):
            made = sparse(size, f"1x{group}", 0.5, Scheme(4, group, symmetric))
            rows.append(times(f"W4S50 g{group}{words}", made, dtype, seconds))
            pairs.append((f"W4 g128{words}", f"W4S50 g{group}{words}"))
    return rows, pairs


def bitmaps(size: int, seconds: float, dtype: torch.dtype) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The same."""
    count = int(ROTATION / (size * size * dtype.itemsize)) + 1
    weights = [torch.full((size, size), 0.01, dtype=dtype) for _ in range(count)]
    xs = [torch.randn(tokens, size).to(dtype) for tokens in TOKENS]
    linears = {str(len(x)): steady(lambda w, x: linear(x, w), weights, x, seconds) for x in xs}
    rows = [{"product": "linear", "op": "torch", "bits": 8.0 * dtype.itemsize, "ms": linears}]
    kinds: list[tuple[str, str, float, Scheme | None]] = [
        *((f"bitmask bf16, {share:.0%} zeros", "unstructured", share, None) for share in (0.5, 0.7, 0.9)),
        ("2:4 bf16", "2:4", 0.5, None),
        ("bitmask int4 g128, 50% zeros", "unstructured", 0.5, Scheme(4, 128)),
    ]
    for name, pattern, share, scheme in kinds:
        rows.append(times(name, sparse(size, pattern, share, scheme), dtype, seconds))
    return rows, [("linear", row["product"]) for row in rows[1:]]


PARTS = {"groups": groups, "bitmaps": bitmaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each figure")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--part", choices=PARTS, help="this alone; what was measured of the other stays")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    here, dtype = machine(), getattr(torch, args.dtype)
    stored = RESULTS / "sparse_kernels.json"
    data = json.loads(stored.read_text()) if args.part and stored.exists() else {}
    for part in [args.part] if args.part else PARTS:
        rows, pairs = PARTS[part](args.size, args.seconds, dtype)
        by_name = {row["product"]: row["ms"] for row in rows}
        ratios = {
            f"{fast} over {slow}": {m: by_name[slow][m] / by_name[fast][m] for m in by_name[fast]}
            for slow, fast in pairs
        }
        data[part] = {"machine": here, "arguments": vars(args), "rows": rows, "ratios": ratios}
    text = "# Sparse products on a CPU\n"
    for part in data.values():
        given, about = part["arguments"], part["machine"]
        text += (
            f"\nN = K = {given['size']}, {given['dtype']} activations, {about['threads']} threads, {about['cpu']} "
            f"({about['capability']}), torch {about['torch']}, weights in DRAM. Milliseconds by number of tokens M, "
            "best of three medians; bits of memory for each weight, zeros among them.\n\n"
        )
        names = [f"M={m}" for m in TOKENS]
        cells = [
            [row["product"], row["op"], f"{row['bits']:.2f}", *(f"{row['ms'][str(m)]:.3f}" for m in TOKENS)]
            for row in part["rows"]
        ]
        text += markdown(["product", "kernel", "bits", *names], cells) + "\nHow many times faster:\n\n"
        faster = [[name, *(f"{by[str(m)]:.2f}" for m in TOKENS)] for name, by in part["ratios"].items()]
        text += markdown(["", *names], faster)
    save("sparse_kernels", data, text)
    print(text)


if __name__ == "__main__":
    main()
