"""Distillation: everything that is stored, of the whole model at once, towards what the dense model predicts.

The divergence from the dense model's probabilities is the loss of Hinton et al. 2015, arXiv 1503.02531, and, of rounded
weights, of Liu et al. 2023, "LLM-QAT", arXiv 2305.17888. Codes learn straight through their rounding; masks are fixed.
Unlike stage two of GQSA (`e2e_oqp`), which has scales alone to make up with, it moves codes. It takes more text than
calibration had: what the weights were fitted to says too little of other text to learn from, and nothing to judge by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

import torch

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Tuner, TuningProblem, TuningSolution
from trifold.tuning.descent import Rates, descend

_FEW_STEPS = 64
_MUCH, _LEAST = 0.16, 0.5  # nats that call for the whole rate, and the share of it that is used for few
_PROBES = 4


@METHODS.register("distill")
@dataclass(frozen=True)
class Distill(Tuner):
    """epochs: passes over the text to learn from. more_windows: so many times the windows of calibration follow them in
    the text, where it has as many; a quarter of all, the last ones, is judged by and not learned from. lr_weights: in
    codes for rounded weights, else in 64ths of the root mean square; lr_scales: in shares of the scale; lr_zeros: in
    codes. These are for all steps together, where much was lost: each of n goes 1 / sqrt(n) of that, so that noise
    alone gets equally far with any amount of text, but never more than an eighth: codes that turn at once overshoot. A
    smaller loss has smaller steps, by its root: what noise costs grows with their square. They fall to zero along a
    cosine; 0 leaves that kind as it is."""

    level: ClassVar[Literal["block", "model"]] = "model"

    epochs: int = 1
    more_windows: int = 3
    lr_weights: float = 0.4
    lr_scales: float = 0.04
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
        share = _boldness(problem) / math.sqrt(max(self.epochs * len(problem.learn), _FEW_STEPS))
        rates = Rates(self.lr_weights * share, self.lr_scales * share, self.lr_zeros * share)
        return descend(problem, rates, self.epochs, "distill")


@torch.no_grad()
def _boldness(problem: TuningProblem) -> float:
    """The share of the rates that suits what was lost, in nats, on the first batches."""
    weights = {name: decided.dequantize for name, decided in problem.canonical.items()}
    lost = fmean(float(problem.loss(batch, weights)) for batch in problem.learn[:_PROBES])
    return min(max(math.sqrt(max(lost, 0.0) / _MUCH), _LEAST), 1.0)
