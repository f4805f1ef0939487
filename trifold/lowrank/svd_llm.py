"""SVD-LLM: the weight of rank r with the least output error, by an SVD of the weight times a root of the Gram matrix.

Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
arXiv 2403.07378: their whitening, without the update of parameters. It is taken from the Gram matrix of the outputs,
which needs no Cholesky factor, and so is also what LoRD does (Kaushal et al. 2023, arXiv 2309.14021) without centring;
with it, the outputs less their mean are approximated, and the bias makes the mean right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, LayerProblem
from trifold.core.statistics import Gram, Mean, Statistic
from trifold.lowrank.factorizer import Factorizer, check_damping
from trifold.lowrank.metric import Metric


@METHODS.register("svd_llm")
@dataclass(frozen=True)
class SVDLLM(Factorizer):
    """damping: multiple of mean(diag H) added to the diagonal; nothing here needs it. centre: LoRD's centring; a layer
    without a bias then gets one."""

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, Mean)

    damping: float = 0.0
    centre: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        if self.centre and self.damping:
            raise RecipeError(f"damping={self.damping} has no place in centre=true, which inverts nothing; set it to 0")

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        return (Gram, Mean) if self.centre else (Gram,)

    def metric(self, problem: LayerProblem) -> Metric:
        assert problem.gram is not None
        if self.centre and problem.mean is not None:
            return Metric.centred(problem.gram, problem.mean, problem.tokens)
        return Metric.of(problem.gram, self.damping)

    def shift(self, difference: torch.Tensor, problem: LayerProblem) -> torch.Tensor | None:
        return difference @ problem.mean if self.centre and problem.mean is not None else None
