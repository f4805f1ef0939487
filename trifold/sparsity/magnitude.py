"""Magnitude pruning: the smallest weights go. The baseline that every other pruner has to beat.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.method import METHODS
from trifold.core.pattern import Pattern
from trifold.core.scheme import Scheme
from trifold.core.statistics import Statistic
from trifold.sparsity.pruner import Pruner
from trifold.sparsity.survivors import Metric


@METHODS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Pruner):
    """Looks at no data, unless the rest is refitted.

    pattern: `unstructured`, `N:M` (N of M kept) or `1xG`.
    """

    pattern: str = "unstructured"
    refit: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pattern)

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        return super().gathers if self.refit else ()

    def layout(self, scheme: Scheme | None) -> Pattern:
        return Pattern.parse(self.pattern)

    def prune(self, target: torch.Tensor, pattern: Pattern, metric: Metric | None) -> tuple[torch.Tensor, torch.Tensor]:
        mask = pattern.mask(target.square(), self.share(pattern), self.scope)
        return mask, target.masked_fill(~mask, 0.0)
