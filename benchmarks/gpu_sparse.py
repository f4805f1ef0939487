"""Sparse products on a GPU: values against float64, and microseconds beside cuBLAS. `gpu_check.py` calls `rows`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sparse_kernels import sparse
from torch.nn.functional import linear

from trifold.core.scheme import Scheme
from trifold.formats import FORMATS
from trifold.kernels.dispatch import resolve

KINDS: dict[str, tuple[str, float, Scheme | None]] = {
    "W4S50 g16": ("1x16", 0.5, Scheme(4, 16)),
    "W4S50 g32": ("1x32", 0.5, Scheme(4, 32)),
    "bitmap 70%": ("unstructured", 0.7, None),
    "bitmap 80%": ("unstructured", 0.8, None),
    "bitmap 90%": ("unstructured", 0.9, None),
    "2:4": ("2:4", 0.5, None),
}


def rows(
    clock: Callable[[list[Callable[[], Any]]], float], size: int = 8192, tokens: tuple[int, ...] = (1, 8, 16)
) -> list[dict[str, Any]]:
    """clock: microseconds of one of several calls, in turn, such as `gpu_check.microseconds`. bfloat16, N = K = size.

    A row for each kind of weight and number of tokens: the op, its error over what rounding allows (at most 1), its
    microseconds, and how many times faster it is than bfloat16 through cuBLAS.
    """
    found = []
    dense = torch.randn(size, size, device="cuda").bfloat16()
    times = {}
    for m in tokens:
        x = torch.randn(m, size, device="cuda").bfloat16()
        weights = [dense, dense.clone(), dense.clone()]
        times[m] = clock([lambda w=w, x=x: linear(x, w) for w in weights])
    del dense, weights
    for name, (pattern, share, scheme) in KINDS.items():
        packed, spec = sparse(size, pattern, share, scheme)
        exact = FORMATS.get(spec["format"]).unpack(packed, spec).dequantize().cuda().double()
        on_gpu = {key: tensor.cuda() for key, tensor in packed.items()}
        op = resolve(spec, torch.bfloat16, torch.device("cuda"))
        prepared = [op.prepare({k: t.clone() for k, t in on_gpu.items()}, spec) for _ in range(6)]
        for m in tokens:
            x = torch.randn(m, size, device="cuda").bfloat16()
            y, ideal = op.run(x, prepared[0], spec, None).double(), x.double() @ exact.T
            allowed = 2**-7 * ideal.abs() + (size * 2**-24 + 2**-8) * (x.double().abs() @ exact.abs().T)
            spent = clock([partial(op.run, x, tensors, spec, None) for tensors in prepared])
            row = {"weights": name, "op": op.name, "tokens": m, "error": float(((y - ideal).abs() / allowed).max())}
            found.append(row | {"microseconds": spent, "over_cublas": times[m] / spent})
    return found
