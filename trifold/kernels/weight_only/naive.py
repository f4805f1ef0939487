"""The reference: unpack everything, multiply."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from trifold.formats.base import Spec, unpack
from trifold.kernels.op import Op, Tensors


def weight_only(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, in) times the dequantised weight (out, in), rounded to x's dtype, plus bias -> (M, out)."""
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Naive(Op):
    """Any format, any device; a dense copy of the weight lives for as long as the call."""

    name = "weight_only.naive"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        return weight_only(x, unpack(tensors, spec).dequantize(), bias)
