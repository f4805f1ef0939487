"""HQQ: half-quadratic quantisation, which looks at no data.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog/. The error of a group is measured by an l_p norm with p < 1, which tolerates a
few large errors for the sake of many small ones. An auxiliary error E splits the problem

    min over E, zero   sum |E|^p + beta/2 (W - scale (codes - zero) - E)^2

into two that have closed forms, solved in turns while beta grows: E shrinks the error that is there, and the
zero-point is the mean that fits W - E.

Beyond the paper, the second step is the whole least-squares problem: a line through (code, W - E), whose slope is
the scale and whose intercept is the zero-point. So it also serves symmetric schemes and tables. Errors are counted in
steps of the grid, which makes the outcome independent of the size of the weights; and each group keeps the best
scale and zero-point that it has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Bounds, LayerMethod, LayerProblem, LayerSolution
from trifold.core.obs import NotFiniteError
from trifold.core.ranges import from_bounds, group_view, round_scale, round_zero, slabs, to_codes
from trifold.core.scheme import Scheme
from trifold.quantizers.rtn import round_to_nearest

_TRUST = 3.0  # a refitted scale this many times larger or smaller is not believed


@METHODS.register("hqq")
@dataclass(frozen=True)
class HQQ(LayerMethod):
    """variant: "joint" fits scale and zero-point; "paper" the zero-point alone, as the authors' code does.

    norm: p. beta, growth: weight of the coupling and its factor per step. steps: how many turns.
    """

    variant: Literal["joint", "paper"] = "joint"
    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise RecipeError(f"norm={self.norm} is outside 0..1; 0.7 is the paper's")
        if self.steps < 0 or not (0 < self.beta < math.inf and 1 <= self.growth < math.inf):
            chosen = f"steps={self.steps}, beta={self.beta}, growth={self.growth}"
            raise RecipeError(
                f"{chosen}: at least 0, above 0 and at least 1 are needed; 20, 10 and 1.01 are the paper's"
            )

    def solve(self, problem: LayerProblem) -> LayerSolution:
        canonical = {}
        for name, weight in problem.weights.items():
            if not torch.isfinite(weight).all():
                raise NotFiniteError("the weight holds NaN or infinity")
            scheme = problem.schemes[name]
            canonical[name] = round_to_nearest(weight, self.ranges(weight, scheme), scheme)
        return LayerSolution(canonical)

    def ranges(self, weight: torch.Tensor, scheme: Scheme) -> Bounds:
        """Scale and zero-point of a finite weight (out, in) float32, as `fit_ranges` returns them."""
        if scheme.group_size == "tensor":
            weight = weight.reshape(1, -1)
        columns = weight.shape[1]
        width = columns if scheme.group_size == "tensor" else scheme.group_width(columns)
        share = torch.nn.functional.pad(torch.ones(1, columns, device=weight.device), (0, -columns % width))
        share = share.reshape(1, -1, width)  # the filling of a short last group counts nothing
        share = share / share.sum(-1, keepdim=True)
        if self.variant == "paper":
            fitted = [self._paper(group_view(weight, width), share, scheme)]
        else:
            fitted = [self._joint(group_view(slab, width), share, scheme) for slab in slabs(weight, width)]
        zeros = [zero.squeeze(-1) for _, zero in fitted if zero is not None]
        return torch.cat([scale.squeeze(-1) for scale, _ in fitted]), torch.cat(zeros) if zeros else None

    def _joint(self, groups: torch.Tensor, share: torch.Tensor, scheme: Scheme) -> Bounds:
        """groups: (rows, groups, width). share: (1, groups, width), sums to 1 in each group, as `mean` counts."""

        def mean(x: torch.Tensor) -> torch.Tensor:
            return (x * share).sum(-1, keepdim=True)

        scale, zero = from_bounds(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), scheme)
        kept, kept_zero, least, beta = scale, zero, torch.full_like(scale, torch.inf), self.beta
        for _ in range(self.steps + 1):
            origin = scheme.midpoint if zero is None else zero
            codes = to_codes(groups, scale, origin, scheme)
            error = groups - (codes - origin) * scale
            loss = mean(error.abs().pow(self.norm))
            better = loss < least
            least, kept = torch.where(better, loss, least), torch.where(better, scale, kept)
            target = groups - shrink(error / scale, beta, self.norm) * scale
            if zero is not None and kept_zero is not None:
                kept_zero = torch.where(better, zero, kept_zero)
                middle, level = mean(codes), mean(target)
                slope = mean((codes - middle) * (target - level)) / mean((codes - middle).square())
                zero = round_zero(middle - level / _believed(slope, scale), scheme)
                origin = zero
            levels = codes - origin
            scale = round_scale(_believed(mean(target * levels) / mean(levels.square()), scale), scheme)
            beta *= self.growth
        return kept, kept_zero

    def _paper(self, groups: torch.Tensor, share: torch.Tensor, scheme: Scheme) -> Bounds:
        """The authors' loop: errors in units of the weights, one end for all groups, the last zero-point stays."""
        scale, zero = from_bounds(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), scheme)
        if zero is None:
            return scale, None
        least, beta = math.inf, self.beta
        for _ in range(self.steps):
            codes = to_codes(groups, scale, zero, scheme)
            error = groups - (codes - zero) * scale
            target = groups - shrink(error, beta, self.norm)
            zero = ((codes - target / scale) * share).sum(-1, keepdim=True)
            beta *= self.growth
            loss = float((error.abs() * share).sum())
            if loss >= least:
                break
            least = loss
        return scale, round_zero(zero, scheme)


def shrink(x: torch.Tensor, beta: float, norm: float) -> torch.Tensor:
    """The shrinkage that stands for the proximal step of |x|^norm: towards zero by |x|^(norm - 1) / beta."""
    size = x.abs()
    return (size - size.pow(norm - 1) / beta).clamp_(min=0).mul_(x.sign())


def _believed(scale: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The new scales, or the ones before where they are not numbers or far away."""
    return torch.where((scale > before / _TRUST) & (scale < before * _TRUST), scale, before)
