"""Activations rounded to their grid, then the weight-only product in tiles."""

from __future__ import annotations

import torch

from trifold.core.scheme import fake_quantize_per_token
from trifold.formats.base import Spec
from trifold.kernels.int8_dynamic.naive import input_scheme_of
from trifold.kernels.op import Tensors
from trifold.kernels.weight_only import blockwise


class Blockwise(blockwise.Blockwise):
    """Activations of 2 to 8 bits; rounded values are in x's dtype."""

    name = "int8_dynamic.blockwise"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        return super().run(fake_quantize_per_token(x, input_scheme_of(spec)), tensors, spec, bias)
