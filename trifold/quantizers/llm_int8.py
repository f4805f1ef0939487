"""LLM.int8(): input features with outliers stay in 16 bits, the others are rounded, weights and activations.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339. The
paper looks for outliers in each call, and so keeps every weight twice or takes the rounded ones for them; here
they are found in calibration, once, and only their columns are stored in 16 bits. A feature that exceeds the
threshold for the first time afterwards is rounded with its token, as without the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from trifold.core.canonical import Canonical, Dense, Split
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, LayerMethod, LayerProblem, LayerSolution
from trifold.core.ranges import Ranges, fit_ranges
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.core.statistics import Sample, Statistic
from trifold.quantizers.rtn import round_to_nearest

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@METHODS.register("llm_int8")
@dataclass(frozen=True)
class LLMInt8(LayerMethod):
    """Rounds to nearest what has no outliers, in the layer's scheme.

    threshold: the least magnitude of an outlier; 0 looks for none, which is plain rounding. positions: a feature
    is kept if it has outliers in at least this share of the sampled tokens (the paper calls features with 6 %
    systematic); 0 takes a single one. dtype: of the weights kept, "auto" the 16-bit one that is closer to them.
    ranges: how scales of the others are found, as in `rtn`.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (Sample,)

    threshold: float = 6.0
    positions: float = 0.06
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    ranges: Ranges = "minmax"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise RecipeError(f"threshold={self.threshold}: must be 0 or more; 6 is the paper's, 0 keeps nothing")
        if not 0 <= self.positions <= 1:
            raise RecipeError(f"positions={self.positions} is outside 0..1; 0.06 is the paper's")

    def solve(self, problem: LayerProblem) -> LayerSolution:
        assert problem.sample is not None
        outlier = self._outliers(problem.sample)
        canonical = {name: self._divide(w, outlier, problem.schemes[name]) for name, w in problem.weights.items()}
        found = {"outliers": int(outlier.sum()), "inputs": len(outlier)}
        return LayerSolution(canonical, {name: {"llm_int8": found} for name in canonical})

    def _outliers(self, sample: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (in,) bool: which features stay in 16 bits."""
        if not self.threshold:
            return sample.new_zeros(sample.shape[1], dtype=torch.bool)
        found = (sample.abs() >= self.threshold).sum(0)
        outlier = found >= max(1, math.ceil(self.positions * len(sample)))
        return outlier if int((~outlier).sum()) > 1 else torch.ones_like(outlier)  # one column is no matrix to round

    def _divide(self, weight: torch.Tensor, outlier: torch.Tensor, scheme: Scheme) -> Canonical:
        kept = Dense(weight[:, outlier].to(self._dtype(weight[:, outlier])))
        if outlier.all():
            return kept
        rest = weight[:, ~outlier]
        rounded = round_to_nearest(rest, fit_ranges(rest, scheme, self.ranges), scheme)
        return Split(1, outlier.long(), (rounded, kept)) if outlier.any() else rounded

    def _dtype(self, weight: torch.Tensor) -> torch.dtype:
        if self.dtype != "auto":
            return SCALE_DTYPES[self.dtype]
        errors = [float((weight.to(dtype).float() - weight).double().square().sum()) for dtype in _SIXTEEN_BIT]
        return _SIXTEEN_BIT[1] if errors[1] < errors[0] else _SIXTEEN_BIT[0]
