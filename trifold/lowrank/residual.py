"""A low-rank residual over a compressed weight: W ≈ Q + L R, with a few bits per weight spent on L R.

L R is the best one of its rank for the output error of Q: an SVD of (W - Q) times a root of the Gram matrix. With a
diagonal one that is LQER (Zhang et al. 2024, arXiv 2402.02446), with the whole one QERA and EoRA (arXiv 2410.06040,
2410.21271). Q is then found again for W - L R, and so on by turns (LoftQ, Li et al. 2023, arXiv 2310.08659; with GPTQ's
loss and rounded factors CALDERA, Saha et al. 2024, arXiv 2405.18886). The error does not fall in every turn, so the
best one is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from trifold.core.allocation import Option
from trifold.core.canonical import Canonical, Sum
from trifold.core.errors import RecipeError, unknown_name
from trifold.core.method import METHODS, Budget, LayerMethod, LayerProblem, LayerSolution
from trifold.core.refit import aiming, toward_dense
from trifold.core.scheme import ScaleDtype, Scheme
from trifold.core.statistics import Drift, Gram, Statistic
from trifold.formats import describe, stored_bytes
from trifold.lowrank.factorizer import check_damping
from trifold.lowrank.factors import Layout, factorise
from trifold.lowrank.metric import Metric

DEFAULT_BITS = 0.2
_WHOLE = 16  # bits per weight that a share of a budget is of
_POINTS = 256  # ranks at most that an allocation chooses from


@METHODS.register("residual")
@dataclass(frozen=True)
class Residual(LayerMethod):
    """base, base_options: the method whose weights are corrected, which gets the step's scheme. lr_bits: bits per
    weight of each layer's residual, from which its rank follows; without any, 0.2. global_lr_bits: instead, of all
    layers of the step together, divided among them by how much of what rounding lost a rank brings back. sensitive:
    whether, in that, errors count by how much of them leaves the block. factor_bits: of a number in a factor; 16 keeps
    them in `dtype`. factor_group: numbers that share a scale. turns: how often both are solved; 1 is EoRA.
    dense_targets, damping: as in `reduced_rank`. multiple_of: ranks from eight times it on are divisible by it.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, Drift)
    takes_scheme: ClassVar[Literal["always", "if given", "never"]] = "if given"
    instead: ClassVar[Mapping[str, str]] = {"lr_bits": "global_lr_bits", "global_lr_bits": "lr_bits"}

    base: str = "gptq"
    base_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lr_bits: float | None = None
    global_lr_bits: float | None = None
    sensitive: bool = True
    factor_bits: int = 4
    factor_group: int = 128
    turns: int = 5
    dense_targets: float = 0.5
    damping: float = 0.01
    multiple_of: int = 8
    dtype: ScaleDtype = "bfloat16"

    def __post_init__(self) -> None:
        check_damping(self.damping)
        for name in ("lr_bits", "global_lr_bits"):
            bits = getattr(self, name)
            if bits is not None and not 0 <= bits <= 16:
                raise RecipeError(f"{name}={bits} is outside 0..16; {DEFAULT_BITS} is usual, 0 means no residual")
        if self.lr_bits is not None and self.global_lr_bits is not None:
            raise RecipeError(
                f"lr_bits={self.lr_bits} is of each layer and global_lr_bits={self.global_lr_bits} of all of them "
                "together; leave one of them out"
            )
        if self.turns < 1 or self.multiple_of < 1:
            raise RecipeError(f"turns={self.turns}, multiple_of={self.multiple_of}: at least 1 and 1 are needed")
        if not 0 <= self.dense_targets <= 1:
            raise RecipeError(f"dense_targets={self.dense_targets} is outside 0..1; 0.5 is usual, 0 means none")
        self._layout()
        self._base()

    def _layout(self) -> Layout:
        scheme = None if self.factor_bits == 16 else Scheme(self.factor_bits, self.factor_group)
        return Layout(scheme, self.dtype, pivot=False)

    def _base(self) -> LayerMethod:
        kind = METHODS.get(self.base)
        if not issubclass(kind, LayerMethod) or kind is type(self):
            raise RecipeError(f"base={self.base!r} does not decide the weights of a layer; gptq and sparsegpt do")
        known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for option in self.base_options:
            if option not in known:
                raise RecipeError(f"base_options: {unknown_name(f'option of {self.base}', option, known)}")
        return kind(**self.base_options)

    @property
    def gathers(self) -> tuple[type[Statistic], ...]:
        own = (Gram, Drift) if self.dense_targets else (Gram,)
        return tuple(dict.fromkeys((*own, *self._base().gathers)))

    def check(self, shape: tuple[int, int], scheme: Scheme | None) -> None:
        base = self._base()
        if scheme is None and base.takes_scheme == "always":
            raise RecipeError(f"residual over {self.base}, which rounds; give the step a `scheme`")
        base.check(shape, scheme)

    @property
    def bits(self) -> float:
        """Bits per weight of the residuals, of each or of all together."""
        given = self.global_lr_bits if self.lr_bits is None else self.lr_bits
        return DEFAULT_BITS if given is None else given

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The largest rank whose factors take at most `bits` per weight of an (out, in) weight; 0 if none does."""
        room = self.bits * shape[0] * shape[1] / 8

        def fits(rank: int) -> bool:
            return self._bytes(shape, rank) <= room * (1 + 1e-9)

        low, high = 0, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return self._even(low)

    def _even(self, rank: int) -> int:
        return rank - rank % self.multiple_of if rank >= 8 * self.multiple_of else rank

    def _bytes(self, shape: tuple[int, int], rank: int) -> int:
        return stored_bytes(describe(self._layout().sketch(shape, rank))) if rank else 0

    # -- a shared budget, in bytes of residuals --------------------------------------------------------

    @property
    def budget(self) -> Budget | None:
        shared = self.global_lr_bits
        return None if shared is None else Budget(1 - shared / _WHOLE, "curves", sensitive=self.sensitive)

    def full_cost(self, shape: tuple[int, int], scheme: Scheme | None) -> float:
        return shape[0] * shape[1] * _WHOLE / 8

    def at(self, share: float, draft: bool = False) -> Residual:
        return dataclasses.replace(self, lr_bits=(1 - share) * _WHOLE, global_lr_bits=None)

    def curve(self, weight: torch.Tensor, scheme: Scheme | None, gram: torch.Tensor) -> list[Option]:
        """Every rank with its bytes and the share of the output's energy that is lost with it: the tail of the squared
        singular values of what the base, alone, gets wrong."""
        shape, metric = (weight.shape[0], weight.shape[1]), Metric.of(gram, self.damping)
        schemes = {} if scheme is None else {"": scheme}
        rounded = self._base().solve(LayerProblem({"": weight}, schemes, gram)).canonical[""].dequantize()
        energies, whole = metric.energies(weight - rounded), self.full_cost(shape, scheme)
        total = max(metric.loss(weight), torch.finfo(torch.float64).tiny)
        tails = (energies.flip(0).cumsum(0).flip(0) / total).tolist()
        ranks = list(dict.fromkeys(map(self._even, range(min(shape)))))
        ranks = ranks[:: -(-len(ranks) // _POINTS)]
        costs = [self._bytes(shape, rank) for rank in ranks]
        return [Option(1 - cost / whole, cost, tails[rank]) for rank, cost in zip(ranks, costs, strict=True)]

    # -- solving ---------------------------------------------------------------------------------------

    def sketch(self, shape: tuple[int, int], scheme: Scheme | None) -> Canonical:
        base, rank = self._base().sketch(shape, scheme), self.rank_of(shape)
        return Sum((base, self._layout().sketch(shape, rank))) if rank else base

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        rest = 4 * sum(out * width for out, width in shapes)
        then = rest + max(self._base().workspace(shapes), *map(Metric.workspace, shapes))
        return aiming(shapes, self.damping, self.dense_targets, then)

    def solve(self, problem: LayerProblem) -> LayerSolution:
        assert problem.gram is not None
        metric, base = Metric.of(problem.gram, self.damping), self._base()
        targets = {name: self._target(weight, problem, metric) for name, weight in problem.weights.items()}
        ranks = {name: self.rank_of((w.shape[0], w.shape[1])) for name, w in targets.items()}
        found: dict[str, Canonical] = {}
        losses: dict[str, list[float]] = {name: [] for name in targets}
        rest, bounds = dict(targets), problem.bounds
        events: dict[str, dict[str, Any]] = {}
        for turn in range(self.turns if any(ranks.values()) else 1):
            solution = base.solve(dataclasses.replace(problem, weights=rest, bounds=bounds))
            events = events or {name: dict(event) for name, event in solution.events.items()}
            for name, target in targets.items():
                canonical = solution.canonical[name]
                whole = canonical.dequantize()
                if ranks[name]:
                    residual = factorise(target - whole, metric, ranks[name], self._layout())
                    product = residual.dequantize()
                    canonical, whole = Sum((canonical, residual)), whole + product
                    rest[name] = target - product
                loss = metric.loss(target - whole)
                if turn == 0 or loss < min(losses[name]):
                    found[name] = canonical
                losses[name].append(loss)
            bounds = {}  # they were found for the weight without a residual
        for name in targets:
            best = min(range(len(losses[name])), key=losses[name].__getitem__) + 1
            events.setdefault(name, {})["residual"] = {"rank": ranks[name], "turn": best, "losses": losses[name]}
        return LayerSolution(found, events)

    def _target(self, weight: torch.Tensor, problem: LayerProblem, metric: Metric) -> torch.Tensor:
        if not self.dense_targets or problem.drift is None:
            return weight
        return toward_dense(weight, metric.gram, problem.drift, self.dense_targets)
