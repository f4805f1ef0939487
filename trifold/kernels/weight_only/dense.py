"""Products with numbers that are stored as they are: no float32 copy is made of them."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from trifold.formats.base import Spec
from trifold.kernels.op import Op, Tensors


class Dense(Op):
    """Any device and dtype; a weight of another dtype than x is cast for as long as the call."""

    name = "weight_only.dense"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, tensors["weight"].reshape(spec["shape"]).to(x.dtype), bias)


class Identity(Op):
    """No product at all."""

    name = "weight_only.identity"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        return x if bias is None else x + bias


class LowRank(Op):
    """Two thin products; the weight itself is never formed."""

    name = "weight_only.low_rank"

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        left, right = (tensors[name].to(x.dtype) for name in ("weight", "weight_right"))
        return linear(linear(x, right.reshape(spec["rank"], -1)), left.reshape(-1, spec["rank"]), bias)
