"""Dequantise a block of rows into a tile, multiply, go on to the next: never more than one tile is dense."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from trifold.formats.base import Spec
from trifold.kernels.op import Op, Tensors
from trifold.kernels.rows import DECODERS, row_blocks


class Blockwise(Op):
    """Any device and dtype; any format that can decode some rows alone."""

    name = "weight_only.blockwise"

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if spec["format"] not in DECODERS:
            return f"format {spec['format']!r} cannot decode some rows alone"
        return None

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        out_features, in_features = spec["shape"]
        y = x.new_empty(x.shape[0], out_features)
        for start, stop in row_blocks(out_features, in_features, x.device):
            weight = self.rows(tensors, spec, start, stop, x.dtype)
            y[:, start:stop] = linear(x, weight, None if bias is None else bias[start:stop])
        return y
