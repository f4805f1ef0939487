"""What the pruning methods share: settings, and the road from a mask to what is stored."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from trifold.core.canonical import Canonical, Dense, Sparse
from trifold.core.errors import RecipeError
from trifold.core.method import Budget, LayerMethod, LayerProblem, LayerSolution
from trifold.core.pattern import Pattern, Scope, check_sparsity, dropped
from trifold.core.ranges import Ranges
from trifold.core.refit import refit, toward_dense
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.core.statistics import Drift, Gram, Statistic
from trifold.sparsity.survivors import Metric, StoredDtype, events, round_survivors, sparse

DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Pruner(LayerMethod):
    """sparsity: the share of weights, or groups, that is dropped; N:M has its own. global_sparsity: instead, the share
    that all layers of the step drop together; allocation says how it is divided: "curves" measures what each layer
    loses at several sparsities and takes from those that lose least, "owl" spares blocks with outliers, "uniform"
    treats all alike. scope: whether each row drops as many, or the matrix as a whole. refit: the weights that stay
    are set to the exact least-squares solution. dense_targets: how far a refit aims at the dense model's outputs, 0
    (this layer's own) to 1; it follows the dense model beside the compressed one. damping: multiple of mean(diag H)
    added to the diagonal; it grows by itself while H is singular. dtype: of weights that are not rounded. ranges,
    refine: how those that are get their scales, and the rounds of refinement, as in `gptq`.
    """

    takes_scheme: ClassVar[Literal["always", "if given", "never"]] = "if given"
    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, Drift)
    instead: ClassVar[Mapping[str, str]] = {"sparsity": "global_sparsity", "global_sparsity": "sparsity"}

    sparsity: float | None = None
    global_sparsity: float | None = None
    allocation: Literal["curves", "owl", "uniform"] = "curves"
    scope: Scope = "row"
    refit: bool = True
    dense_targets: float = 0.5
    damping: float = 0.01
    dtype: StoredDtype = "bfloat16"
    ranges: Ranges = "mse"
    refine: int = 2

    def __post_init__(self) -> None:
        for setting in ("sparsity", "global_sparsity"):
            if getattr(self, setting) is not None:
                check_sparsity(getattr(self, setting), setting)
        if self.sparsity is not None and self.global_sparsity is not None:
            raise RecipeError(
                f"sparsity={self.sparsity} is of each layer and global_sparsity={self.global_sparsity} of all of them "
                "together; leave one of them out"
            )
        if not 0 <= self.dense_targets <= 1:
            raise RecipeError(f"dense_targets={self.dense_targets} is outside 0..1; 0.25 is usual, 0 means none")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise RecipeError(f"damping={self.damping}: must be 0 or more; 0.01 is usual")
        if self.refine < 0:
            raise RecipeError(f"refine={self.refine}: must be 0 or more; 2 is usual")

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        return (Gram, Drift) if self.refit and self.dense_targets else (Gram,)

    def sketch(self, shape: tuple[int, int], scheme: Scheme | None) -> Canonical:
        """As many weights stay as will, at other places, so the size is exact, with two exceptions. Of groups that do
        not divide the row, where survivors are counted one by one, it is the most that there can be; and what shares
        a `global_sparsity` is taken to give up as much everywhere."""
        values = super().sketch(shape, scheme)
        if scheme is None:
            values = Dense(torch.empty(shape, dtype=SCALE_DTYPES[self.dtype], device="meta"))
        pattern, (rows, columns) = self.layout(scheme), shape
        units = -(-columns // pattern.size)
        if pattern.keep:
            mask = (torch.arange(columns) % pattern.size < pattern.keep).expand(rows, -1)
        elif self.scope == "row":
            stay = torch.arange(units) < units - dropped(self.share(pattern), units)
            mask = pattern.expand(stay[None], columns).expand(rows, -1)
        else:
            stay = torch.arange(rows * units) < rows * units - dropped(self.share(pattern), rows * units)
            mask = pattern.expand(stay.reshape(units, rows).T, columns)  # short groups at the end go first
        return Sparse(values, mask, pattern.text)

    @abstractmethod
    def layout(self, scheme: Scheme | None) -> Pattern:
        """The pattern of a weight with this scheme."""

    @abstractmethod
    def prune(self, target: torch.Tensor, pattern: Pattern, metric: Metric | None) -> tuple[torch.Tensor, torch.Tensor]:
        """target (out, in) float32 -> mask (out, in) bool and the values at it, zero elsewhere, without a refit."""

    def share(self, pattern: Pattern) -> float:
        """The share of weights that goes."""
        if pattern.sparsity is not None:
            return pattern.sparsity
        given = self.global_sparsity if self.sparsity is None else self.sparsity
        return DEFAULT_SPARSITY if given is None else given

    @property
    def budget(self) -> Budget | None:
        return None if self.global_sparsity is None else Budget(self.global_sparsity, self.allocation)

    def at(self, share: float, draft: bool = False) -> Pruner:
        own = replace(self, sparsity=share, global_sparsity=None)
        return replace(own, refit=False, refine=0) if draft else own

    def check(self, shape: tuple[int, int], scheme: Scheme | None) -> None:
        pattern = self.layout(scheme)
        pattern.check(shape[1])
        if pattern.sparsity is not None and self.global_sparsity is not None:
            raise RecipeError(
                f"global_sparsity={self.global_sparsity} cannot be divided with pattern={pattern.text!r}, which drops "
                f"{pattern.sparsity:g} of every layer; use pattern='unstructured' or groups"
            )
        if pattern.sparsity is not None and self.sparsity not in (None, pattern.sparsity):
            raise RecipeError(
                f"sparsity={self.sparsity} cannot be had with pattern={pattern.text!r}, which drops "
                f"{pattern.sparsity:g}; leave it out or use pattern='unstructured'"
            )

    def solve(self, problem: LayerProblem) -> LayerSolution:
        metric = None if problem.gram is None or not self.gathers else Metric.of(problem.gram, self.damping)
        solved = {}
        for name, weight in problem.weights.items():
            target = self._target(weight, problem.drift, metric)
            solved[name] = self._solve(target, problem.schemes.get(name), metric)
        return LayerSolution(solved, events(problem, solved, metric))

    def _target(self, weight: torch.Tensor, drift: torch.Tensor | None, metric: Metric | None) -> torch.Tensor:
        if metric is None:
            return weight
        if self.refit and self.dense_targets and drift is not None:
            weight = toward_dense(weight, metric.hessian, drift, self.dense_targets)
        return weight.masked_fill(metric.dead, 0.0)  # they meet nothing, and are the first to go

    def _solve(self, target: torch.Tensor, scheme: Scheme | None, metric: Metric | None) -> Sparse:
        pattern = self.layout(scheme)
        mask, values = self.prune(target, pattern, metric)
        if self.refit and metric is not None:
            values = refit(target, metric.hessian, mask, values)
        if scheme is None:
            return sparse(values, mask, pattern, self.dtype)
        return round_survivors(values, target, mask, pattern, scheme, metric, self.ranges, self.refine)
