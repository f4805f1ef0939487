"""E2E-OQP: scales and zero-points alone, of the whole model, on what it predicts; codes and masks are fixed.

Stage two of the recovery of Zeng et al. 2024, "GQSA", arXiv 2412.17560, which is that of Chen et al. 2024,
"EfficientQAT", arXiv 2407.11062.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Tuner, TuningProblem, TuningSolution
from trifold.core.scheme import Scheme
from trifold.tuning.descent import Rates, descend


@METHODS.register("e2e_oqp")
@dataclass(frozen=True)
class E2EOQP(Tuner):
    """toward: what is learned, the dense model's probabilities of all next tokens, or the next token of the text,
    which is the paper's and wants far more text than there are scales. epochs: passes over the calibration batches.
    lr_scales: in shares of the scale, for each step. lr_zeros: in codes; 0, the default, tunes scales alone."""

    level: ClassVar[Literal["block", "model"]] = "model"

    toward: Literal["dense", "text"] = "dense"
    epochs: int = 2
    lr_scales: float = 0.002
    lr_zeros: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.lr_scales, self.lr_zeros)
        if self.epochs < 0 or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise RecipeError(f"epochs={self.epochs}, lr={rates}: must all be 0 or more")

    @property
    def follows_dense(self) -> bool:
        return self.toward == "dense"

    def check(self, scheme: Scheme | None) -> None:
        if scheme is None:
            raise RecipeError("e2e_oqp tunes scales, and a layer without a scheme has none; use bqpo alone")

    def tune(self, problem: TuningProblem) -> TuningSolution:
        return descend(problem, Rates(0.0, self.lr_scales, self.lr_zeros), self.epochs, "e2e_oqp")
