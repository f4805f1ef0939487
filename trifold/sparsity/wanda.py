"""Wanda: weights whose product with their input is small go.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. The score
|W| ||x||, squared here, is what dropping a weight costs if the inputs do not depend on each other. The paper leaves
the other weights as they are (`refit: false`); beyond it, they are refitted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.method import METHODS
from trifold.core.pattern import Pattern
from trifold.core.scheme import Scheme
from trifold.sparsity.pruner import Pruner
from trifold.sparsity.survivors import Metric


@METHODS.register("wanda")
@dataclass(frozen=True)
class Wanda(Pruner):
    """pattern: `unstructured`, `N:M` (N of M kept) or `1xG`."""

    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pattern)

    def layout(self, scheme: Scheme | None) -> Pattern:
        return Pattern.parse(self.pattern)

    def prune(self, target: torch.Tensor, pattern: Pattern, metric: Metric | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert metric is not None
        energy = metric.hessian.diagonal().to(target.dtype)
        mask = pattern.mask(target.square() * energy, self.share(pattern), self.scope)
        return mask, target.masked_fill(~mask, 0.0)
