"""The reference: activations rounded to their grid, everything else in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from trifold.core.inputs import InputScheme, round_input
from trifold.formats.base import Spec, unpack
from trifold.kernels.op import Op, Tensors


def input_scheme_of(spec: Spec) -> InputScheme:
    """The scheme of the activations that a spec with an `input` describes."""
    return InputScheme(**spec["input"])


def rounded(x: torch.Tensor, tensors: Tensors, spec: Spec) -> torch.Tensor:
    """x (M, in) as the spec's `input` rounds it; same dtype."""
    return round_input(x, input_scheme_of(spec), tensors.get("input_scale"))


class Naive(Op):
    """Any format, any device; a dense copy of the weight lives for as long as the call."""

    name = "rounded_input.naive"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        weight = unpack(tensors, spec).dequantize()
        return linear(rounded(x.float(), tensors, spec), weight, None if bias is None else bias.float()).to(x.dtype)
