"""Activations rounded to their grid, then the weight-only product in tiles."""

from __future__ import annotations

import torch

from trifold.formats.base import Spec
from trifold.kernels.op import Tensors
from trifold.kernels.rounded_input.naive import rounded
from trifold.kernels.weight_only import blockwise


class Blockwise(blockwise.Blockwise):
    """Any input scheme; rounded values are in x's dtype."""

    name = "rounded_input.blockwise"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        return super().run(rounded(x, tensors, spec), tensors, spec, bias)
