"""Reduced-rank regression of the dense model's outputs on the inputs that the compressed model has.

Izenman 1975, "Reduced-rank regression for the multivariate linear model". The best map of any rank from the inputs X at
hand to the dense outputs W X_dense is W* = W X_dense Xᵀ (X Xᵀ)⁻¹; the best one of rank r is the r-rank weight nearest
to W* in the metric X Xᵀ. So errors of the layers before are made good, as far as the rank allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, LayerProblem
from trifold.core.refit import aiming, toward_dense
from trifold.core.statistics import Drift, Gram, Statistic
from trifold.lowrank.factorizer import Factorizer, check_damping
from trifold.lowrank.metric import Metric


@METHODS.register("reduced_rank")
@dataclass(frozen=True)
class ReducedRank(Factorizer):
    """dense_targets: how far to aim at the dense model's outputs, 0 (this layer's own: SVD-LLM's whitening) to 1.
    damping: multiple of mean(diag H) added to the diagonal. refit: solve the left factor on the stored right one."""

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, Drift)

    pivot: bool = True
    dense_targets: float = 0.5
    damping: float = 0.01
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        if not 0 <= self.dense_targets <= 1:
            raise RecipeError(f"dense_targets={self.dense_targets} is outside 0..1; 0.5 is usual, 0 means none")

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        return (Gram, Drift) if self.dense_targets else (Gram,)

    @property
    def refits(self) -> bool:
        return self.refit

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        return aiming(shapes, self.damping, self.dense_targets, super().workspace(shapes))

    def metric(self, problem: LayerProblem) -> Metric:
        assert problem.gram is not None
        return Metric.of(problem.gram, self.damping)

    def target(self, weight: torch.Tensor, problem: LayerProblem, metric: Metric) -> torch.Tensor:
        if not self.dense_targets or problem.drift is None:
            return weight
        return toward_dense(weight, metric.gram, problem.drift, self.dense_targets)
