"""The reference: every survivor meets its activation, nothing else is read."""

from __future__ import annotations

import torch

from trifold.core.canonical import Sparse
from trifold.formats.base import Spec, unpack
from trifold.kernels.op import Op, Tensors


def sparse(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, in), weight float32 and mask (out, in) -> (M, out) of x's dtype; products and sums in float64."""
    row, column = mask.nonzero().unbind(1)
    products = x.double()[:, column] * weight[mask].double()
    y = torch.zeros(len(x), len(mask), dtype=torch.float64, device=x.device).index_add_(1, row, products)
    return (y if bias is None else y + bias.double()).to(x.dtype)


class Naive(Op):
    """Any sparse format, any device."""

    name = "sparse.naive"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        weight = unpack(tensors, spec)
        assert isinstance(weight, Sparse)
        return sparse(x, weight.dequantize(), weight.mask, bias)
