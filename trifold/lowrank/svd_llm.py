"""SVD-LLM: the weight of rank r with the least output error, by an SVD of the weight times a root of the Gram matrix.

Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
arXiv 2403.07378: their whitening, without the update of parameters. It is taken from the Gram matrix of the outputs, which
needs no Cholesky factor, and so is also what LoRD does (Kaushal et al. 2023, arXiv 2309.14021) without centring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trifold.core.method import METHODS, LayerProblem
from trifold.core.statistics import Gram, Statistic
from trifold.lowrank.factorizer import Factorizer, check_damping
from trifold.lowrank.metric import Metric


@METHODS.register("svd_llm")
@dataclass(frozen=True)
class SVDLLM(Factorizer):
    """damping: multiple of mean(diag H) added to the diagonal; nothing here needs it."""

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)

    def metric(self, problem: LayerProblem) -> Metric:
        assert problem.gram is not None
        return Metric.of(problem.gram, self.damping)
