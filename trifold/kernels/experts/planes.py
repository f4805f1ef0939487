"""Experts in bit planes, on NVIDIA GPUs."""

from __future__ import annotations

import torch

from trifold.formats.base import Spec
from trifold.kernels.experts.op import ExpertsOp
from trifold.kernels.experts.routing import Routing
from trifold.kernels.op import Tensors
from trifold.kernels.weight_only.planes import ops
from trifold.kernels.weight_only.planes.configs import dense_from
from trifold.kernels.weight_only.planes.op import arguments


class PlaneExperts(ExpertsOp):
    """One launch for all experts; a program has tokens of one. Few tokens: with many, dense tiles are faster."""

    name = "experts.planes"

    def supports(self, spec: Spec, experts: int, slots: int) -> str | None:
        if slots >= dense_from(spec["bits"]) * experts:
            return f"{slots} tokens for {experts} experts are worth dense tiles"
        if slots * spec["shape"][0] >= 2**31:
            return f"{slots} tokens of out_features={spec['shape'][0]} overflow an int32 index"
        return None

    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        weight: torch.Tensor | None,
        tensors: Tensors,
        spec: Spec,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return ops.plane_experts(x, *routing, weight, bias=bias, **arguments(tensors, spec))
