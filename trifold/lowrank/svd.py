"""Plain SVD: the rank-r weight that is nearest to the weight itself. The baseline; it looks at no data.

Eckart and Young 1936.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.allocation import Option
from trifold.core.method import METHODS, LayerProblem
from trifold.core.scheme import Scheme
from trifold.lowrank.factorizer import Factorizer
from trifold.lowrank.metric import Metric


@METHODS.register("svd")
@dataclass(frozen=True)
class SVD(Factorizer):
    """Its budget is divided by singular values of the weights alone."""

    rounder: str = "rtn"

    def metric(self, problem: LayerProblem) -> Metric:
        weight = next(iter(problem.weights.values()))
        return Metric.plain(weight.shape[1], weight.device)

    def curve(self, weight: torch.Tensor, scheme: Scheme | None, gram: torch.Tensor) -> list[Option]:
        return super().curve(weight, scheme, torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device))
