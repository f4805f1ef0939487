"""ALPS: choose all weights that stay together, by splitting the problem in two that are easy.

Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
arXiv 2406.07831. Of one copy of the weights the loss is minimised, of the other the pattern is exact, and ADMM draws
the two together under a penalty that grows. One factorisation of H serves all penalties and rows. The paper then
improves the weights that stay by a few conjugate gradient steps; here they are refitted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.method import METHODS
from trifold.core.pattern import Pattern, Scope
from trifold.core.scheme import Scheme
from trifold.sparsity.pruner import Pruner
from trifold.sparsity.survivors import Metric

_STEPS, _LEAST_STEPS, _INTERVAL = 300, 30, 3
_PENALTY = 0.03  # of the first step; the mean eigenvalue is 1
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of the penalty, where more than that share of the mask has changed
_SETTLED = 1e-4


@METHODS.register("alps")
@dataclass(frozen=True)
class ALPS(Pruner):
    """pattern: `unstructured`, `N:M` (N of M kept) or `1xG`."""

    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pattern)

    def layout(self, scheme: Scheme | None) -> Pattern:
        return Pattern.parse(self.pattern)

    def prune(self, target: torch.Tensor, pattern: Pattern, metric: Metric | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert metric is not None
        return together(target, metric, pattern, self.share(pattern), self.scope)


def together(
    target: torch.Tensor, metric: Metric, pattern: Pattern, share: float, scope: Scope
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (out, in) bool and values that go with it, zero elsewhere, for target (out, in).

    In units in which H has a unit diagonal: B <- (H + p I)⁻¹ (H W - V + p D), D <- the part of B + V / p that the
    pattern keeps, V <- V + p (B - D), while the penalty p grows. About forty steps of two products (out, in, in).
    """
    scale = metric.hessian.diagonal().sqrt()
    eigenvalues, basis = metric.spectrum
    weight = target.double() * scale
    pull = (weight @ (metric.hessian / scale / scale[:, None])).to(target.dtype)
    weight = weight.to(target.dtype)
    mask, penalty = pattern.mask(weight.square(), share, scope), _PENALTY
    if mask.all():
        return mask, target
    kept, force, before = weight * mask, torch.zeros_like(weight), mask
    for step in range(1, _STEPS + 1):
        free = ((pull - force + penalty * kept) @ basis / (eigenvalues + penalty)) @ basis.T
        wanted = free + force / penalty
        mask = pattern.mask(wanted.square(), share, scope)
        kept = wanted * mask
        force += penalty * (free - kept)
        if step % _INTERVAL:
            continue
        changed = float((mask != before).sum()) / max(int(mask.sum()), 1)
        if step >= _LEAST_STEPS and changed < _SETTLED:
            break
        penalty *= next((growth for more, growth in _GROWTH if changed > more), 1.0)
        before = mask
    return mask, (kept / scale).to(target.dtype)
