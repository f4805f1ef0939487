"""Activations rounded to their grid, then the weight-only product in tiles, in float32."""

from __future__ import annotations

import torch

from trifold.formats.base import Spec
from trifold.kernels.op import Tensors
from trifold.kernels.rounded_input.naive import rounded
from trifold.kernels.weight_only import blockwise


class Blockwise(blockwise.Blockwise):
    """Any input scheme. Never more than a tile of the weight is dense."""

    name = "rounded_input.blockwise"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        y = super().run(rounded(x.float(), tensors, spec), tensors, spec, None if bias is None else bias.float())
        return y.to(x.dtype)
