"""GQSA: drop whole groups of a row, the very groups that share a scale, and round the others.

Zeng et al. 2024, "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
arXiv 2412.17560. A group that is dropped costs neither codes nor a scale, and a kernel skips it. The saliency here is
exact: w_g ([H⁻¹]_gg)⁻¹ w_gᵀ is by how much the loss rises when group g goes and all other weights adapt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from trifold.core.canonical import Canonical, Quantized, Sparse
from trifold.core.columns import Kept
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS
from trifold.core.pattern import Pattern
from trifold.core.ranges import expand_groups
from trifold.core.refine import descend
from trifold.core.row_scales import LARGEST, to_row_scales
from trifold.core.scheme import Scheme
from trifold.formats.group_sparse import MOST_GROUPS
from trifold.sparsity.alps import together
from trifold.sparsity.pruner import Pruner
from trifold.sparsity.sparsegpt import prune_in_order
from trifold.sparsity.survivors import Metric, masked

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
    scale_bits: 16, of the scheme's `scale_dtype`; or 8, codes that a bfloat16 number of their row multiplies.
    """

    takes_scheme: ClassVar[Literal["always", "if given", "never"]] = "always"

    saliency: Saliency = "block"
    order: Literal["together", "once", "sequential"] = "together"
    block_size: int = 128
    scale_bits: Literal[8, 16] = 16

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
        if self.scale_bits == 8 and scheme.scale_dtype != "bfloat16":
            raise RecipeError(f"scale_dtype={scheme.scale_dtype!r} is of scale_bits=16; with 8 it is bfloat16, of rows")
        if (groups := -(-shape[1] // scheme.group_size)) > MOST_GROUPS:
            raise RecipeError(
                f"format group_sparse_int holds rows of {MOST_GROUPS} groups at most, not in_features={shape[1]} in "
                f"{groups} of group_size={scheme.group_size}; use a larger group_size"
            )
        super().check(shape, scheme)

    def sketch(self, shape: tuple[int, int], scheme: Scheme | None) -> Canonical:
        assert scheme is not None
        found = super().sketch(shape, scheme)
        if self.scale_bits == 16:
            return found
        assert isinstance(found, Sparse) and isinstance(found.values, Quantized)
        ones = torch.ones(()).expand(scheme.scale_shape(*shape))
        return replace(found, values=replace(found.values, scheme=_with_float32(scheme), scale=LARGEST * ones))

    def _solve(self, target: torch.Tensor, scheme: Scheme | None, metric: Metric | None) -> Sparse:
        assert scheme is not None and isinstance(scheme.group_size, int)
        if self.scale_bits == 16:
            return super()._solve(target, scheme, metric)
        scheme = _with_float32(scheme)
        solved = super()._solve(target, scheme, metric)
        assert isinstance(solved.values, Quantized) and metric is not None
        values, width = solved.values, scheme.group_width(target.shape[1])
        scale = to_row_scales(values.scale, solved.mask[:, ::width])
        zero = None if values.zero_point is None else values.zero_point.float()
        origin = torch.full_like(scale, scheme.midpoint) if zero is None else zero
        each, offset = (expand_groups(b, solved.shape, width) for b in (scale, origin))
        hessian = (metric.hessian / metric.hessian.diagonal().mean()).float()
        codes = descend(target, hessian, values.codes.float(), each, offset, scheme, mask=solved.mask)
        return masked(codes, scale, zero, solved.mask, self.layout(scheme), scheme)

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


def _with_float32(scheme: Scheme) -> Scheme:
    return replace(scheme, scale_dtype="float32")


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
