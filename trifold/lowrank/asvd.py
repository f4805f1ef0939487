"""ASVD: an SVD of the weight with its input features scaled by how large they are.

Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
arXiv 2312.05821.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, LayerProblem
from trifold.core.statistics import AbsMean, Gram, Statistic
from trifold.lowrank.factorizer import Factorizer
from trifold.lowrank.metric import Metric


@METHODS.register("asvd")
@dataclass(frozen=True)
class ASVD(Factorizer):
    """alpha: exponent of the mean of |x| in the scales; 0 is plain SVD."""

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, AbsMean)

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 2:
            raise RecipeError(f"alpha={self.alpha} is outside 0..2; 0.5 is the paper's")

    def metric(self, problem: LayerProblem) -> Metric:
        assert problem.absmean is not None
        return Metric.diagonal((problem.absmean.double() + 1e-6) ** (2 * self.alpha))
