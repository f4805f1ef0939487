"""The third part of `gpu_check.py`: sparse products, values against float64, and times beside dense ones.

W4S50 is to be faster than dense W4 as on a CPU: 1.25 times with groups of 16, 1.5 with 32. "published" is what
Flash-LLM says of bitmaps over cuBLAS on an A100 (Xia et al. 2023, arXiv 2309.10285).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_layers import Gpu, random_layer
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
PUBLISHED = {"bitmap 70%": 1.4, "bitmap 80%": 1.7, "bitmap 90%": 2.1}


def rows(gpu: Gpu) -> list[dict[str, Any]]:
    """bfloat16, N = K = 8192. A row for each kind of weight and number of tokens: the op, its error over what rounding
    allows (at most 1), its microseconds, and how many times faster it is than bfloat16 through cuBLAS and than our
    dense int4 in groups of 128.
    """
    size, tokens = (64, (1,)) if gpu.dry else (8192, (1, 8, 16))
    found, times, packed_times = [], {}, {}
    xs = {m: torch.randn(m, size, device=gpu.device).bfloat16() for m in tokens}
    dense = [torch.randn(size, size, device=gpu.device).bfloat16() for _ in range(3)]
    for m, x in xs.items():
        times[m] = gpu.microseconds([partial(linear, x, weight) for weight in dense])
    del dense
    layers = [random_layer((size, size), Scheme(4, 128), gpu.device)[0] for _ in range(2 if gpu.dry else 6)]
    for m, x in xs.items():
        packed_times[m] = gpu.microseconds([partial(layer, x) for layer in layers])
    del layers
    for name, (pattern, share, scheme) in KINDS.items():
        packed, spec = sparse(size, pattern, share, scheme)
        exact = FORMATS.get(spec["format"]).unpack(packed, spec).dequantize().to(gpu.device).double()
        op = resolve(spec, torch.bfloat16, torch.device("cuda"))
        weights = [op.prepare({k: t.to(gpu.device, copy=True) for k, t in packed.items()}, spec) for _ in range(6)]
        for m, x in xs.items():
            y, ideal = op.run(x, weights[0], spec, None).double(), x.double() @ exact.T
            allowed = 2**-7 * ideal.abs() + (size * 2**-24 + 2**-8) * (x.double().abs() @ exact.abs().T)
            spent = gpu.microseconds([partial(op.run, x, tensors, spec, None) for tensors in weights])
            error = float(((y - ideal).abs() / allowed.clamp(min=1e-30)).max())
            row = {"sparse weights": name, "op": op.name, "tokens": m, "error": error, "microseconds": spent}
            ratios = {"over cublas": times[m] / spent, "over dense W4": packed_times[m] / spent}
            found.append(row | ratios | {"published": PUBLISHED.get(name, "")})
    return found
