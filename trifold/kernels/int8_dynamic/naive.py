"""The reference: activations rounded to their grid, everything else in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from trifold.core.scheme import InputScheme, fake_quantize_per_token
from trifold.formats.base import FORMATS, Spec
from trifold.kernels.op import Op, Tensors


def input_scheme_of(spec: Spec) -> InputScheme:
    """The scheme of the activations that a spec with an `input` describes."""
    return InputScheme(**spec["input"])


def dynamic(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scheme: InputScheme) -> torch.Tensor:
    """x (M, in), rounded per token, times the dequantised weight (out, in) float32 plus bias -> (M, out)."""
    rounded = fake_quantize_per_token(x.float(), scheme)
    return linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)


class Naive(Op):
    """Any format, any device; a dense copy of the weight lives for as long as the call."""

    name = "int8_dynamic.naive"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        weight = FORMATS.get(spec["format"]).unpack(tensors, spec).dequantize()
        return dynamic(x, weight, bias, input_scheme_of(spec))
