"""What calibration found of the inputs of a block's linears."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.method import Statistics
from trifold.core.statistics import AbsMax, AbsMean, Drift, Gram, Mean, Sample, Statistic


@dataclass(frozen=True)
class Seen:
    """What calibration found of one input. gram, drift: (in, in) float64. absmax, absmean, mean: (in,) float32. sample:
    (tokens, in) float32. tokens: how many were seen."""

    gram: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    absmean: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    tokens: int = 0

    def divided(self, divisor: torch.Tensor) -> Seen:
        """The same of the input divided by (in,); the Gram matrix in place, for two may not fit."""
        inverse = divisor.double().reciprocal()
        gram = None if self.gram is None else self.gram.mul_(inverse).mul_(inverse[:, None])
        absmax, sample, absmean, mean = (
            None if t is None else t / divisor for t in (self.absmax, self.sample, self.absmean, self.mean)
        )
        return Seen(gram, None, absmax, sample, absmean, mean, self.tokens)

    def holds(self, needs: set[type[Statistic]]) -> bool:
        """Whether these statistics are among it."""
        found = {Gram: self.gram, Drift: self.drift, AbsMax: self.absmax, Sample: self.sample}
        found |= {AbsMean: self.absmean, Mean: self.mean}
        return all(found.get(kind) is not None for kind in needs)

    @classmethod
    def of(cls, statistics: Statistics) -> Seen:
        absmean = statistics.absmean if AbsMean in statistics else None
        plain = (statistics.absmax, statistics.sample, absmean, statistics.mean, statistics.tokens)
        return cls(statistics.gram, statistics.drift, *plain)
