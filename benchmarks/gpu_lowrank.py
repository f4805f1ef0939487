"""The fourth part of `gpu_check.py`: products of low rank in one piece, beside the same part by part."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from gpu_layers import Gpu, layer_of, random_layer
from torch.nn.functional import linear

from trifold.core.canonical import Canonical, Chain, Dense, Identity, LowRank, Split, Sum
from trifold.core.scheme import Scheme
from trifold.kernels import PackedLinear


def _int4(gpu: Gpu, rows: int, columns: int, group: int = 128) -> Canonical:
    return random_layer((rows, columns), Scheme(4, group), gpu.device)[1]


def _plain(gpu: Gpu, rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, device=gpu.device) / columns**0.5).bfloat16()


def kinds(gpu: Gpu) -> dict[str, Canonical]:
    """Weights of N = K = 8192: 60 % of the numbers as pivots and other rows, and int4 with a residual of rank 128."""
    size, rank, small = (64, 24, 16) if gpu.dry else (8192, 3008, 128)
    index = torch.ones(size, dtype=torch.int64, device=gpu.device)
    index[torch.randperm(size, device=gpu.device)[:rank]] = 0

    def pivots(left: Canonical) -> Canonical:
        return Split(0, index, (Identity(rank), left))

    left, right = _int4(gpu, size, small), _int4(gpu, small, size)
    return {
        "rank 60% int4": Chain((pivots(_int4(gpu, size - rank, rank)), _int4(gpu, rank, size))),
        "rank 60% bf16": Chain((pivots(Dense(_plain(gpu, size - rank, rank))), Dense(_plain(gpu, rank, size)))),
        "int4 + rank 128 int4": Sum((_int4(gpu, size, size), Chain((left, right)))),
        "int4 + rank 128 bf16": Sum(
            (_int4(gpu, size, size), LowRank(_plain(gpu, size, small), _plain(gpu, small, size)))
        ),
    }


def rows(gpu: Gpu) -> list[dict[str, Any]]:
    """A row for each kind and number of tokens: whether values are right (an error of at most 1), microseconds in one
    piece and part by part, and how many times faster than bfloat16 through cuBLAS the first is."""
    found = []
    for name, weight in kinds(gpu).items():
        layers = [layer_of(weight, gpu.device) for _ in range(2 if gpu.dry else 6)]
        exact = weight.dequantize().double()
        dense = [exact.bfloat16() for _ in range(3)]
        for tokens in (1,) if gpu.dry else (1, 8, 16):
            x = torch.randn(tokens, exact.shape[1], device=gpu.device).bfloat16()
            y, ideal = layers[0](x).double(), x.double() @ exact.T
            same = torch.equal(layers[0](x).double(), y)
            with mock.patch("trifold.kernels.packed_linear.fused", lambda *_: None):
                apart, parts = layers[0](x).double(), _times(gpu, layers, x)
            # both round what is between the factors: ours may not be further from the truth than twice the other
            error = float((y - ideal).norm() / (2 * (apart - ideal).norm() + 2**-8 * ideal.norm()))
            spent = _times(gpu, layers, x)
            times = gpu.microseconds([partial(linear, x, w) for w in dense])
            row = {"weights": name, "tokens": tokens, "error": error if same else float("inf"), "microseconds": spent}
            found.append(row | {"part by part": parts, "over cublas": times / spent})
        del layers, dense, exact
        gpu.free()
    return found


def _times(gpu: Gpu, layers: list[PackedLinear], x: torch.Tensor) -> float:
    with torch.no_grad():
        return gpu.microseconds([partial(layer, x) for layer in layers])
