"""SparseGPT: drop weights column by column, and let the later columns absorb the error.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774. It is GPTQ's sweep with another decision; what stays may be rounded in the same pass. Beyond the
paper, the mask that the sweep finds is kept, and the weights that stay are refitted exactly, then rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.canonical import Sparse
from trifold.core.columns import ColumnDecision, Kept, NearestCode
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS
from trifold.core.obs import sweep
from trifold.core.pattern import Pattern, Scope, dropped
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import Scheme
from trifold.sparsity.pruner import Pruner
from trifold.sparsity.survivors import Metric, masked


@METHODS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Pruner):
    """pattern: `unstructured`, `N:M` (N of M kept) or `1xG`, which drops groups. scope: of the share that each block
    of columns drops. block_size: columns whose mask is chosen at once, from what the columns before them left.

    With `refit: false` and a scheme, pruning and rounding are one pass, as in the paper, to scales that are found
    before it.
    """

    pattern: str = "unstructured"
    scope: Scope = "matrix"
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        Pattern.parse(self.pattern)
        if self.block_size < 1:
            raise RecipeError(f"block_size={self.block_size}: at least 1 is needed; 128 is the paper's")

    def layout(self, scheme: Scheme | None) -> Pattern:
        return Pattern.parse(self.pattern)

    def prune(self, target: torch.Tensor, pattern: Pattern, metric: Metric | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert metric is not None
        keep = torch.ones_like(target.T, memory_format=torch.contiguous_format)
        share = self.share(pattern)
        return prune_in_order(target, metric.upper, pattern, share, self.scope, keep, Kept(keep), self.block_size)[:2]

    def _solve(self, target: torch.Tensor, scheme: Scheme | None, metric: Metric | None) -> Sparse:
        if self.refit or scheme is None or metric is None:
            return super()._solve(target, scheme, metric)
        pattern, width = self.layout(scheme), scheme.group_width(target.shape[1])
        scale, zero = fit_ranges(target, scheme, self.ranges)
        origin = torch.full_like(scale, scheme.midpoint) if zero is None else zero
        each, offset = (b.expand(len(target), -1) for b in (scale, origin))
        keep = torch.ones_like(target.T, memory_format=torch.contiguous_format)
        grid = NearestCode(each.T, offset.T, [j // width for j in range(target.shape[1])], scheme, keep)
        share = self.share(pattern)
        mask, *_ = prune_in_order(target, metric.upper, pattern, share, self.scope, keep, grid, self.block_size)
        return masked(grid.codes.T.contiguous(), scale, zero, mask, pattern, scheme)


def prune_in_order(
    target: torch.Tensor,
    upper: torch.Tensor,
    pattern: Pattern,
    share: float,
    scope: Scope,
    keep: torch.Tensor,
    decide: ColumnDecision,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sweep, with the mask of each block of columns chosen when its turn comes.

    target: (out, in). upper: (in, in). keep: (in, out), the mask that `decide` looks at. Returns mask (out, in) bool,
    the decided weight and the exact loss of each row (out,), as `sweep` has them. N:M is chosen M columns at a time,
    so every choice sees all errors before it.
    """
    block = pattern.size if pattern.keep else -(-block // pattern.size) * pattern.size
    units, per_block = -(-len(upper) // pattern.size), block // pattern.size

    def before_block(start: int, stop: int, columns: torch.Tensor) -> None:
        first = start // pattern.size
        last = min(first + per_block, units)
        rows = 1 if scope == "row" else len(target)  # as many of each block as make the share of all behind it right
        gone = dropped(share, last * rows) - dropped(share, first * rows)
        least = gone / ((last - first) * rows)
        if pattern.keep or pattern.size == 1:
            costs = columns.T.square() / upper.diagonal()[start:stop].square()
            chosen = pattern.mask(costs, least, scope)
        else:
            costs = saliency_ahead(columns.T, upper[start:stop, start:stop], pattern)
            chosen = pattern.group_mask(costs, stop - start, least, scope)
        keep[start:stop] = chosen.T

    decided, loss = sweep(target, upper, decide, block, before_block)
    return keep.T.bool(), decided, loss


def saliency_ahead(weight: torch.Tensor, upper: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """What dropping each group costs if the columns before it are final: w ((U_ggᵀ U_gg)⁻¹) wᵀ, (rows, groups).

    weight: (rows, columns). upper: (columns, columns), of the factor U of H⁻¹ = UᵀU; the inverse of H without its
    first columns begins with U_ggᵀ U_gg.
    """
    costs = [
        torch.linalg.solve_triangular(upper[at : at + pattern.size, at : at + pattern.size].T, part.T, upper=False)
        for at, part in zip(range(0, weight.shape[1], pattern.size), weight.split(pattern.size, dim=1), strict=True)
    ]
    return torch.stack([cost.square().sum(0) for cost in costs], dim=1)
