"""GQSA: drop whole groups of a row, the very groups that share a scale, and round the others.

Zeng et al. 2024, "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
arXiv 2412.17560. A group that is dropped costs neither codes nor a scale, and a kernel skips it. The saliency here is
exact: w_g ([H⁻¹]_gg)⁻¹ w_gᵀ is by how much the loss rises when group g goes and all other weights adapt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from trifold.core.columns import Kept
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS
from trifold.core.pattern import Pattern
from trifold.core.scheme import Scheme
from trifold.sparsity.alps import together
from trifold.sparsity.pruner import Pruner
from trifold.sparsity.sparsegpt import prune_in_order
from trifold.sparsity.survivors import Metric

Saliency = Literal["block", "element", "wanda"]


@METHODS.register("gqsa")
@dataclass(frozen=True)
class GQSA(Pruner):
    """The scheme's `group_size` is also the size of the groups that go.

    order: how groups are chosen. "together" looks for the best set of them, as `alps` does: two groups that can
    stand for each other cost little each and much both. "once" compares their saliencies as they are.
    "sequential" goes through blocks of `block_size` columns, each chosen after the ones before it are final
    and their error folded in (exact saliencies, as in `sparsegpt`). saliency, of "once": "block" is exact, for one
    group; "element" adds up the exact ones of single weights, "wanda" what they cost if the inputs do not depend
    on each other. scope: "row" drops as many groups of each row, which is easier to run fast; "matrix" is free.
    """

    takes_scheme: ClassVar[Literal["always", "if given", "never"]] = "always"

    saliency: Saliency = "block"
    order: Literal["together", "once", "sequential"] = "together"
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise RecipeError(f"block_size={self.block_size}: at least 1 is needed; 128 is usual")
        if self.order != "once" and self.saliency != "block":
            raise RecipeError(f"saliency={self.saliency!r} is of order='once'; order={self.order!r} has none other")

    def layout(self, scheme: Scheme | None) -> Pattern:
        assert scheme is not None and isinstance(scheme.group_size, int)
        return Pattern.parse(f"1x{scheme.group_size}")

    def check(self, shape: tuple[int, int], scheme: Scheme | None) -> None:
        assert scheme is not None
        if not isinstance(scheme.group_size, int):
            raise RecipeError(
                f"gqsa drops groups that share a scale, and group_size={scheme.group_size!r} has none inside a row; "
                "use a number, such as 16"
            )
        if scheme.grid != "int" or scheme.zero_point != "integer":
            what = f"grid={scheme.grid!r}" if scheme.grid != "int" else "zero_point='real'"
            raise RecipeError(
                f"format group_sparse_int holds integers with integer zero-points, not {what}; `sparsegpt` with "
                f"pattern='1x{scheme.group_size}' is held by the format bitmask"
            )
        super().check(shape, scheme)

    def prune(self, target: torch.Tensor, pattern: Pattern, metric: Metric | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert metric is not None
        share = self.share(pattern)
        if self.order == "together":
            return together(target, metric, pattern, share, self.scope)
        if self.order == "sequential":
            keep = torch.ones_like(target.T, memory_format=torch.contiguous_format)
            found = prune_in_order(target, metric.upper, pattern, share, self.scope, keep, Kept(keep), self.block_size)
            return found[:2]
        costs = group_saliency(target, metric, pattern, self.saliency)
        mask = pattern.group_mask(costs, target.shape[1], share, self.scope)
        return mask, target.masked_fill(~mask, 0.0)


def group_saliency(
    weight: torch.Tensor, metric: Metric, pattern: Pattern, saliency: Saliency = "block"
) -> torch.Tensor:
    """What dropping each group costs: (out, in) -> (out, groups)."""
    if saliency == "wanda":
        return pattern.group_scores(weight.square() * metric.hessian.diagonal().to(weight.dtype))
    upper = metric.upper.double()
    if saliency == "element":
        return pattern.group_scores(weight.square() / upper.square().sum(0).to(weight.dtype))
    costs = []
    for at, part in zip(range(0, len(upper), pattern.size), weight.split(pattern.size, dim=1), strict=True):
        columns = upper[: at + part.shape[1], at : at + part.shape[1]]
        factor = torch.linalg.cholesky(columns.T @ columns)  # of [H⁻¹]_gg
        costs.append(torch.linalg.solve_triangular(factor, part.T.double(), upper=False).square().sum(0))
    return torch.stack(costs, dim=1).to(weight.dtype)
