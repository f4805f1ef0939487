"""Distillation: everything that is stored, of the whole model at once, towards what the dense model predicts.

The divergence from the dense model's probabilities is the loss of Hinton et al. 2015, arXiv 1503.02531, and, of rounded
weights, of Liu et al. 2023, "LLM-QAT", arXiv 2305.17888. Codes learn straight through their rounding; masks are fixed.
Unlike stage two of GQSA (`e2e_oqp`), which has scales alone to make up with, it moves codes. It takes more text than
calibration had: what the weights were fitted to says too little of other text to learn from, and nothing to judge by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Tuner, TuningProblem, TuningSolution
from trifold.tuning.descent import Rates, descend


@METHODS.register("distill")
@dataclass(frozen=True)
class Distill(Tuner):
    """epochs: passes over the text to learn from. more_windows: so many times the windows of calibration follow them in
    the text, where it has as many; a quarter of all, the last ones, is judged by and not learned from. lr_weights: in
    codes for rounded weights, else in 64ths of the root mean square, for each step; lr_scales: in shares of the scale;
    lr_zeros: in codes. All fall to zero along a cosine; 0 leaves that kind as it is."""

    level: ClassVar[Literal["block", "model"]] = "model"

    epochs: int = 1
    more_windows: int = 3
    lr_weights: float = 0.04
    lr_scales: float = 0.004
    lr_zeros: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.lr_weights, self.lr_scales, self.lr_zeros)
        if self.epochs < 0 or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise RecipeError(f"epochs={self.epochs}, lr={rates}: must all be 0 or more")
        if self.more_windows < 0:
            raise RecipeError(f"more_windows={self.more_windows}: must be 0 or more; 3 is usual")

    @property
    def more_text(self) -> int:
        return self.more_windows

    def tune(self, problem: TuningProblem) -> TuningSolution:
        return descend(problem, Rates(self.lr_weights, self.lr_scales, self.lr_zeros), self.epochs, "distill")
