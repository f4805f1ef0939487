"""What the methods that replace a weight by two factors share: sizes, budgets, and what a layer keeps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from trifold.core.allocation import Option
from trifold.core.canonical import Canonical
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, Budget, LayerMethod, LayerProblem, LayerSolution
from trifold.core.scheme import ScaleDtype, Scheme
from trifold.core.statistics import Statistic
from trifold.formats import describe, stored_bytes
from trifold.lowrank.factors import Layout, factorise
from trifold.lowrank.metric import Metric

DEFAULT_KEEP = 0.8
_POINTS = 256  # ranks at most that an allocation chooses from
_LEAST = 0.05  # of its bytes, that a layer keeps in an allocation


@dataclass(frozen=True)
class Factorizer(LayerMethod):
    """keep: the share of its bytes that each layer keeps. global_keep: instead, the share that all layers of the step
    keep together, divided among them by what their singular values say. max_bytes: the same, as a number of bytes.
    rank: instead, one rank for all layers. Without any, `keep` is 0.8. What would not be smaller in factors stays
    whole. sensitive: whether, in a shared budget, errors count by how much of them leaves the block; if not, relative
    errors of all layers count alike. multiple_of: ranks are divisible by it, if the layer is large enough. pivot: store
    rows of the weight as the right factor, which saves rank² numbers. dtype: of factors that are not rounded. With a
    scheme both factors are, and so is what stays whole, by `rounder`.
    """

    takes_scheme: ClassVar[Literal["always", "if given", "never"]] = "if given"

    keep: float | None = None
    global_keep: float | None = None
    max_bytes: int | None = None
    rank: int | None = None
    sensitive: bool = True
    multiple_of: int = 8
    pivot: bool = False
    dtype: ScaleDtype = "bfloat16"
    rounder: str = "gptq"

    def __post_init__(self) -> None:
        given = {n: v for n in ("keep", "global_keep", "max_bytes", "rank") if (v := getattr(self, n)) is not None}
        if len(given) > 1:
            both = " and ".join(f"{name}={value}" for name, value in given.items())
            raise RecipeError(f"{both} say different things; set all but one of them to null")
        for name in ("keep", "global_keep"):
            if name in given and not 0 < given[name] <= 1:
                raise RecipeError(f"{name}={given[name]} is outside (0, 1]; 0.8 is usual")
        for name in ("max_bytes", "rank"):
            if name in given and given[name] < 1:
                raise RecipeError(f"{name}={given[name]}: must be at least 1")
        if self.multiple_of < 1:
            raise RecipeError(f"multiple_of={self.multiple_of}: must be at least 1; 8 is usual")
        rounder = METHODS.get(self.rounder)
        if not (issubclass(rounder, LayerMethod) and rounder.takes_scheme == "always"):
            raise RecipeError(f"rounder={self.rounder!r} does not round weights; gptq and rtn do")

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        return self.needs

    # -- sizes -----------------------------------------------------------------------------------------

    def layout(self, scheme: Scheme | None) -> Layout:
        """How factors are stored."""
        return Layout(scheme, self.dtype, self.pivot, self.rounder)

    def rank_of(self, shape: tuple[int, int], scheme: Scheme | None) -> int | None:
        """The rank that a weight (out, in) gets; None if it stays whole. With a shared budget: if all kept as much."""
        whole = self.full_cost(shape, scheme)
        if self.rank is not None:
            fits = self.rank < min(shape) and self._bytes(shape, self.rank, scheme) < whole
            return self.rank if fits else None
        share = self.keep or self.global_keep or DEFAULT_KEEP
        if share >= 1:
            return None
        ranks = self._ranks(shape)
        low, high = 0, len(ranks)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._bytes(shape, ranks[middle], scheme) <= share * whole * (1 + 1e-9)
            low, high = (middle, high) if fits else (low, middle)
        return ranks[low] if ranks and self._bytes(shape, ranks[low], scheme) < whole else None

    def _ranks(self, shape: tuple[int, int]) -> range:
        """Ranks that a weight may have, below the whole one."""
        step = self.multiple_of if min(shape) >= 4 * self.multiple_of else 1
        return range(step, min(shape), step)

    def _bytes(self, shape: tuple[int, int], rank: int, scheme: Scheme | None) -> int:
        return stored_bytes(describe(self.layout(scheme).sketch(shape, rank)))

    def full_cost(self, shape: tuple[int, int], scheme: Scheme | None) -> float:
        """Bytes of the whole weight, as it is stored."""
        return stored_bytes(describe(self.layout(scheme).sketch_leaf(*shape)))

    def sketch(self, shape: tuple[int, int], scheme: Scheme | None) -> Canonical:
        """Exact for a fixed rank or share; with a budget, as if all layers kept as much."""
        rank, layout = self.rank_of(shape, scheme), self.layout(scheme)
        return layout.sketch_leaf(*shape) if rank is None else layout.sketch(shape, rank)

    # -- a shared budget -------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget | None:
        if self.max_bytes is not None:
            return Budget(0.0, "curves", self.max_bytes, self.sensitive)
        return None if self.global_keep is None else Budget(1 - self.global_keep, "curves", sensitive=self.sensitive)

    def at(self, share: float, draft: bool = False) -> Factorizer:
        return replace(self, keep=max(1 - share, 1e-6), global_keep=None, max_bytes=None)

    def curve(self, weight: torch.Tensor, scheme: Scheme | None, gram: torch.Tensor) -> list[Option]:
        """Every rank with its bytes and the share of the output's energy that it loses: the tail of the squared
        singular values; and the whole weight, which loses nothing."""
        shape, whole = (weight.shape[0], weight.shape[1]), self.full_cost((weight.shape[0], weight.shape[1]), scheme)
        energies = Metric.of(gram).energies(weight)
        total = float(energies.sum().clamp(min=torch.finfo(torch.float64).tiny))
        tails = (energies.flip(0).cumsum(0).flip(0) / total).tolist()
        ranks = self._ranks(shape)
        ranks = ranks[:: -(-len(ranks) // _POINTS)] if ranks else ranks
        found = [Option(0.0, whole, 0.0)]
        for rank in ranks:
            cost = self._bytes(shape, rank, scheme)
            if _LEAST * whole <= cost < whole:
                found.append(Option(1 - cost / whole, cost, tails[rank]))
        return found

    # -- solving ---------------------------------------------------------------------------------------

    @abstractmethod
    def metric(self, problem: LayerProblem) -> Metric:
        """How the problem's inputs weigh errors. Raises NotFiniteError."""

    def target(self, weight: torch.Tensor, problem: LayerProblem, metric: Metric) -> torch.Tensor:
        """What the factors are fitted to, (out, in) float32."""
        return weight

    def shift(self, difference: torch.Tensor, problem: LayerProblem) -> torch.Tensor | None:
        """What to add to the bias, (out,) float32, for the difference (out, in) to the dense weight."""
        return None

    @property
    def refits(self) -> bool:
        """Whether the left factor is solved again on what the stored right one gives."""
        return False

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        return max(map(Metric.workspace, shapes))

    def solve(self, problem: LayerProblem) -> LayerSolution:
        metric = self.metric(problem)
        canonical: dict[str, Canonical] = {}
        events: dict[str, dict[str, Any]] = {}
        shifts: dict[str, torch.Tensor] = {}
        for name, weight in problem.weights.items():
            scheme = problem.schemes.get(name)
            rank, layout = self.rank_of((weight.shape[0], weight.shape[1]), scheme), self.layout(scheme)
            wanted = self.target(weight, problem, metric)
            if rank is None:
                canonical[name] = layout.store(wanted if scheme else weight, problem.gram)
            else:
                canonical[name] = factorise(wanted, metric, rank, layout, self.refits)
                shift = self.shift(weight - canonical[name].dequantize(), problem)
                shifts |= {} if shift is None else {name: shift}
            events[name] = {"rank": rank or min(weight.shape)}
        return LayerSolution(canonical, events, shifts)


def check_damping(damping: float) -> None:
    """Raises RecipeError for an impossible one."""
    if not (math.isfinite(damping) and damping >= 0):
        raise RecipeError(f"damping={damping}: must be 0 or more; 0.01 is usual")
