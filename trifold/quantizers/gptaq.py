"""GPTAQ: aim at what the dense model's layer gives on the dense model's inputs.

Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692.
With X the inputs that the compressed prefix gives and X̃ the dense ones, the best real weight for
||Q X - W X̃||² is W (I + D H⁻¹), D = (X̃ - X) Xᵀ, H = X Xᵀ. The paper folds a part of that correction into its
column loop; here it moves the target before the loop, which is the same least-squares problem and leaves the
loop, and everything after it, as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, LayerProblem, LayerSolution
from trifold.core.obs import damped
from trifold.core.statistics import Drift, Gram, Statistic
from trifold.quantizers.gptq import GPTQ


@METHODS.register("gptaq")
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """GPTQ, with targets moved by `strength` of the correction; 0 is GPTQ, 1 the whole least-squares solution.

    The paper's 0.25 is the default. The other settings are GPTQ's.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, Drift)

    strength: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise RecipeError(f"strength={self.strength} is outside 0..1; 0.25 is the paper's")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        assert problem.gram is not None and problem.drift is not None
        factor, info = torch.linalg.cholesky_ex(damped(problem.gram, max(self.damping, 1e-6)))
        if info != 0 or not torch.isfinite(problem.drift).all():
            return super().solve(problem)
        correction = self.strength * torch.cholesky_solve(problem.drift.T, factor).T
        moved = {name: w + (w.double() @ correction).to(w.dtype) for name, w in problem.weights.items()}
        return super().solve(replace(problem, weights=moved))
