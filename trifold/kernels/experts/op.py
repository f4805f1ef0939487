"""What runs the linears of all experts in one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from trifold.formats.base import Spec
from trifold.kernels.experts.routing import Routing
from trifold.kernels.op import Tensors


class ExpertsOp(ABC):
    """Stateless. `spec` is what all experts have."""

    name: ClassVar[str]

    def supports(self, spec: Spec, experts: int, slots: int) -> str | None:
        """None if it can run weights that the op it belongs to runs one by one, `slots` tokens for all experts
        together, else the reason why not."""
        return None

    @abstractmethod
    def run(
        self,
        x: torch.Tensor,
        routing: Routing,
        weight: torch.Tensor | None,
        tensors: Tensors,
        spec: Spec,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (M, in) -> (slots, out), as `naive.expert_linear`. tensors: of one expert's op, stacked; bias: (experts,
        out)."""
