"""GPTQ: round column by column, and let the later columns absorb the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. Then, beyond the paper, scales and codes are refined on the same loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from trifold.core.canonical import Quantized
from trifold.core.columns import NearestCode
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Bounds, LayerMethod, LayerProblem, LayerSolution
from trifold.core.obs import Damping, inverse_cholesky, scaled, sweep
from trifold.core.ranges import Ranges, fit_ranges, to_stored
from trifold.core.refine import refine
from trifold.core.rounding import quantized
from trifold.core.scheme import Scheme
from trifold.core.statistics import Drift, Gram, Statistic

_ELEMENTS_AT_ONCE = 2**22


@METHODS.register("gptq")
@dataclass(frozen=True)
class GPTQ(LayerMethod):
    """The paper's loop with static groups.

    act_order: columns in order of falling diag(H), scales still by original position ("static groups"), so
    the stored layout is the ordinary one. damping: multiple of mean(diag H) added to the diagonal; it grows by
    itself while H is singular. ranges: how scales are found, from the dense weights, before the sweep.
    norm, steps: exponent and resolution of the range search. The authors' code has 2.4 and 80; where scales
    are refitted, 4 is better and 20 is enough.
    refine: rounds of exact scale refit and coordinate descent after the sweep; 0 is the paper.
    block_size: lazily updated columns; speed only.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    act_order: bool = True
    damping: float = 0.01
    ranges: Ranges = "mse"
    norm: float = 4.0
    steps: int = 20
    refine: int = 2
    block_size: int = 128

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise RecipeError(f"damping={self.damping}: must be 0 or more; 0.01 is usual")
        if self.block_size < 1 or self.refine < 0 or self.steps < 1:
            chosen = f"block_size={self.block_size}, refine={self.refine}, steps={self.steps}"
            raise RecipeError(f"{chosen}: at least 1, 0 and 1 are needed")
        if not 0 < self.norm < math.inf:
            raise RecipeError(f"norm={self.norm}: must be above 0; 2.4 and 4 are usual")

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        width, rows = shapes[0][1], sum(out for out, _ in shapes)
        factorising = (8 + 4) * width**2
        at_once = min(rows * width, _ELEMENTS_AT_ONCE)
        sweeping = (4 + 4 * bool(self.refine)) * width**2 + 4 * (rows * width + 16 * at_once)
        return max(factorising, sweeping) + (16 * width**2 if Drift in self.gathers else 0)

    def by_rows(self, scheme: Scheme | None) -> bool:
        return scheme is not None and scheme.group_size != "tensor"

    def solve(self, problem: LayerProblem) -> LayerSolution:
        assert problem.gram is not None
        order = self._order(problem.gram)
        dtype = next(iter(problem.weights.values())).dtype
        upper, damping = inverse_cholesky(problem.gram, self.damping, order, dtype)
        canonical: dict[str, Quantized] = {}
        for scheme, names in _by_scheme(problem).items():
            weights = [problem.weights[n] for n in names]
            bounds = [
                problem.bounds.get(n) or fit_ranges(w, scheme, self.ranges, norm=self.norm, steps=self.steps)
                for n, w in zip(names, weights, strict=True)
            ]
            solved = self._solve(weights, bounds, scheme, order, upper, problem.gram, damping.ratio)
            canonical.update(zip(names, solved, strict=True))
        return LayerSolution(canonical, _events(problem, damping))

    def _order(self, gram: torch.Tensor) -> torch.Tensor:
        if self.act_order:
            return torch.argsort(gram.diagonal(), descending=True, stable=True)
        return torch.arange(len(gram), device=gram.device)

    def _solve(
        self,
        weights: list[torch.Tensor],
        bounds: list[Bounds],
        scheme: Scheme,
        order: torch.Tensor,
        upper: torch.Tensor,
        gram: torch.Tensor,
        damping: float,
    ) -> list[Quantized]:
        """Several weights that share their input and scheme, as one with stacked rows."""
        rows, stacked = [len(w) for w in weights], torch.cat(weights)
        if scheme.group_size == "tensor":  # one scale each; below it is one per row
            bounds = [
                (s.expand(r, 1), None if z is None else z.expand(r, 1)) for (s, z), r in zip(bounds, rows, strict=True)
            ]
        scale = torch.cat([s for s, _ in bounds])
        zero = torch.full_like(scale, scheme.midpoint)
        if not scheme.symmetric:
            zero = torch.cat([z for _, z in bounds if z is not None])
        refines = self.refine and scheme.group_size != "tensor"
        hessian = scaled(gram, damping, stacked.dtype) if refines else None
        found = [
            self._solve_rows(w, s, z, scheme, order, upper, hessian)
            for w, s, z in zip(*(m.split(_rows_at_once(stacked)) for m in (stacked, scale, zero)), strict=True)
        ]
        codes, scale = (torch.cat(parts) for parts in zip(*found, strict=True))
        solved = []
        for c, s, z in zip(codes.split(rows), scale.split(rows), zero.split(rows), strict=True):
            shared = 1 if scheme.group_size == "tensor" else len(s)
            kept = (s[:shared], None if scheme.symmetric else z[:shared])
            solved.append(quantized(c, kept, scheme))
        return solved

    def _solve_rows(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        scheme: Scheme,
        order: torch.Tensor,
        upper: torch.Tensor,
        hessian: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as they are stored, and scales."""
        codes = self._sweep(weight, scale, zero, scheme, order, upper)
        if hessian is not None:
            codes, scale = refine(weight, hessian, codes, scale, zero, scheme, self.refine)
        return to_stored(codes, scheme), scale

    def _sweep(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        scheme: Scheme,
        order: torch.Tensor,
        upper: torch.Tensor,
    ) -> torch.Tensor:
        """The paper's loop: codes (out, in) as floats."""
        group = (order // scheme.group_width(weight.shape[1])).tolist()
        grid = NearestCode(scale.T, zero.T, group, scheme)
        sweep(weight[:, order], upper, grid, self.block_size)
        codes = torch.empty_like(weight)
        codes[:, order] = grid.codes.T
        return codes


def _rows_at_once(weight: torch.Tensor) -> int:
    """Rows are independent of each other; so many are solved together, for what a solve holds beside them."""
    parts = -(-weight.numel() // _ELEMENTS_AT_ONCE)
    return -(-len(weight) // parts)


def _by_scheme(problem: LayerProblem) -> dict[Scheme, list[str]]:
    groups: dict[Scheme, list[str]] = defaultdict(list)
    for name in problem.weights:
        groups[problem.schemes[name]].append(name)
    return groups


def _events(problem: LayerProblem, damping: Damping) -> dict[str, dict[str, object]]:
    return {name: {"damping": asdict(damping)} for name in problem.weights} if damping.remarkable else {}
