"""BQPO: block-wise optimisation of what stays, with its rounding in the loop; the mask is fixed.

Stage one of the recovery of Zeng et al. 2024, "GQSA", arXiv 2412.17560, and for rounded weights without a mask the
block-wise training of Chen et al. 2024, "EfficientQAT", arXiv 2407.11062. The block, on what the compressed blocks
before it give, is brought closer to the outputs of the dense block on the dense model's inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Tuner, TuningProblem, TuningSolution
from trifold.tuning.descent import Rates, descend


@METHODS.register("bqpo")
@dataclass(frozen=True)
class BQPO(Tuner):
    """epochs: passes over the calibration batches. lr_weights: in codes for rounded weights, else in 64ths of the
    root mean square, for each step; lr_scales: in shares of the scale; lr_zeros: in codes. All fall to zero along a
    cosine; 0 leaves that kind as it is."""

    level: ClassVar[Literal["block", "model"]] = "block"

    epochs: int = 4
    lr_weights: float = 0.05
    lr_scales: float = 0.003
    lr_zeros: float = 0.015

    def __post_init__(self) -> None:
        rates = (self.lr_weights, self.lr_scales, self.lr_zeros)
        if self.epochs < 0 or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise RecipeError(f"epochs={self.epochs}, lr={rates}: must all be 0 or more")

    def tune(self, problem: TuningProblem) -> TuningSolution:
        return descend(problem, Rates(self.lr_weights, self.lr_scales, self.lr_zeros), self.epochs, "bqpo")
