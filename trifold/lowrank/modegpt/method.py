"""MoDeGPT: smaller heads and a narrower MLP in place of factors.

Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression", arXiv 2408.09632 (ICLR 2025).
The matrices of a block come in pairs with something between them, and each pair is approximated together: the MLP's
by Nyström, queries and keys by CR, values and output by SVD. What comes out is a model of the same kind with smaller
dimensions, so nothing is added at run time and the KV cache shrinks with the heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from trifold.core.allocation import Option
from trifold.core.errors import RecipeError
from trifold.core.method import METHODS, BlockContext, BlockMethod, Heads, Rewrite
from trifold.core.statistics import Gram, Mean, Statistic
from trifold.lowrank.modegpt.cuts import Cut, Cutter, Inside, ValueScore
from trifold.lowrank.modegpt.pairs import PairScore
from trifold.lowrank.modegpt.shares import Dims, by_curves, fitted, influence_shares, stepped

_BELOW, _POINTS, _BETWEEN = 0.5, 7, 4  # how far curves reach below the wanted share, and how finely

PUBLISHED: dict[str, Any] = {
    "allocation": "influence",
    "inside": "leverage",
    "pairs": "diagonal",
    "values": "alone",
    "sequential": False,
    "damping": 1e-6,
}
"""The options under which the method is the published one."""


@METHODS.register("modegpt")
@dataclass(frozen=True)
class MoDeGPT(BlockMethod):
    """keep: share of the weights of the linears in the blocks that stays.

    allocation: how it is divided. "curves": so that all blocks and modules together lose the least, by what smaller
    dimensions change in the output of their block. "influence": blocks that change their input little give up more,
    at `temperature`, but none more than `most` of itself, with equal shares for its modules. "uniform".
    inside: features of the MLP stay by ridge "leverage", or go by the exact cost of their "removal". pairs: how
    rotary pairs are scored (`pairs.pair_scores`). values: bases of values from the values "alone", from values and
    output projection "joint", or from the heads' actual "outputs", with the projection refitted to all of them.
    sequential: the MLP is cut on what the smaller attention gives. damping: of refits, relative to the mean of the
    Gram matrix's diagonal.
    """

    cuts: ClassVar[bool] = True
    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, Mean)

    keep: float = 0.8
    allocation: Literal["curves", "influence", "uniform"] = "curves"
    inside: Inside = "removal"
    pairs: PairScore = "turned"
    values: ValueScore = "outputs"
    sequential: bool = True
    temperature: float = 0.15
    most: float = 0.8
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RecipeError(f"keep={self.keep}: the share that stays is in 0..1; 0.8 is usual")
        if not 0 < self.most < 1 or self.temperature <= 0 or self.damping < 0:
            raise RecipeError(
                f"most={self.most}, temperature={self.temperature}, damping={self.damping}: most is in 0..1, "
                "temperature above 0, damping not below; 0.8, 0.15 and 0.001 are usual"
            )

    @property
    def kept(self) -> float:
        return self.keep

    def workspace(self, shape: tuple[int, int]) -> int:
        out, width = shape
        return 4 * 8 * width**2 + 3 * 8 * out * width  # an inverse, what is left of it, and its factor

    def _cutter(self, context: BlockContext) -> Cutter:
        return Cutter(context, self.inside, self.pairs, self.values, self.damping)

    def survey(self, context: BlockContext, influence: float) -> dict[str, Any]:
        cutter = self._cutter(context)
        whole, steps = cutter.whole(), cutter.steps()
        curves = {}
        if self.allocation == "curves":
            plain = context.replay("", {})
            for part, size in whole.items():
                low = max(self.keep - _BELOW, 0.1)
                shares = (1 - (1 - low) * i / (_POINTS - 1) for i in range(1, _POINTS))
                sizes = list(dict.fromkeys(stepped(size, share, steps[part]) for share in shares))
                sizes = [smaller for smaller in sizes if smaller < size]
                curves[part] = [
                    [smaller, _change(context, cut, plain)]
                    for smaller, cut in zip(sizes, cutter.cuts(part, sizes), strict=True)
                ]
        total = sum(weight.numel() for weight in context.weights.values())
        found = {"whole": whole, "steps": steps, "units": cutter.units(), "curves": curves}
        return {**found, "influence": influence, "total": total}

    def begin(self, surveys: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        whole, steps, units = ([dict(s[key]) for s in surveys] for key in ("whole", "steps", "units"))
        flexible = [sum(size * u[part] for part, size in w.items()) for w, u in zip(whole, units, strict=True)]
        total = sum(s["total"] for s in surveys)
        budget = self.keep * total - (total - sum(flexible))
        least = sum(step * u[part] for d, u in zip(steps, units, strict=True) for part, step in d.items())
        if budget < least:
            kept = (total - sum(flexible) + least) / max(total, 1)
            raise RecipeError(
                f"keep={self.keep}: of the {total} weights in these layers {total - sum(flexible)} belong to "
                f"dimensions that cannot be cut; keep at least {math.ceil(1000 * kept) / 1000}"
            )
        if self.allocation == "curves":
            curves = [
                {part: _options(s["curves"][part], w[part], d[part], u[part]) for part in w}
                for s, w, d, u in zip(surveys, whole, steps, units, strict=True)
            ]
            dims = by_curves(curves, budget)
        else:
            share = 1 - budget / max(sum(flexible), 1)
            shares = [share] * len(surveys)
            if self.allocation == "influence":
                shares = influence_shares([s["influence"] for s in surveys], share, self.temperature, self.most)
            dims = [
                {part: stepped(size, 1 - given, d[part]) for part, size in w.items()}
                for w, d, given in zip(whole, steps, shares, strict=True)
            ]
        return {"dims": fitted(dims, whole, steps, units, budget), "block": 0, "attention": False}

    def rewrite(self, context: BlockContext, carry: Any) -> tuple[Rewrite, Any]:
        dims: Dims = carry["dims"][carry["block"]]
        cutter = self._cutter(context)
        smaller = {part: size for part, size in dims.items() if size < cutter.whole()[part]}
        heads = {part: size for part, size in smaller.items() if part != "mlp"}
        again = self.sequential and bool(heads) and "mlp" in smaller and not carry["attention"]
        chosen = heads if again else {"mlp": smaller["mlp"]} if carry["attention"] else smaller
        found = {part: next(cutter.cuts(part, [size])) for part, size in chosen.items()}
        after = {**carry, "attention": again, "block": carry["block"] + (not again)}
        return _rewritten(cutter, found, chosen, again), after


def _rewritten(cutter: Cutter, cuts: Mapping[str, Cut], sizes: Dims, again: bool) -> Rewrite:
    weights: dict[str, torch.Tensor] = {}
    parameters: dict[str, torch.Tensor] = {}
    events: dict[str, dict[str, Any]] = {}
    heads = None
    if "mlp" in cuts:
        assert cutter.feed_forward is not None
        weights, parameters = dict(cuts["mlp"].weights), dict(cuts["mlp"].parameters)
        events = {name: {"modegpt": {"error": cuts["mlp"].error}} for name in weights}
    attention = {part: cut for part, cut in cuts.items() if part != "mlp"}
    if attention:
        a = cutter.attention
        assert a is not None
        inside, biases = cutter.assembled(attention)
        weights.update(inside)
        parameters.update(biases)
        frequencies = attention["qk"].frequencies if "qk" in attention else None
        heads = Heads(sizes.get("qk", a.head_dim), sizes.get("v", a.head_dim), frequencies)
        for part, linears in (("qk", ("q", "k")), ("v", ("v", "o"))):
            if part in attention:
                event = {"error": attention[part].error}
                events.update({a.name(linear): {"modegpt": event} for linear in linears})  # type: ignore[arg-type]
    return Rewrite(weights, parameters, events=events, heads=heads, again=again)


def _change(context: BlockContext, cut: Cut, plain: torch.Tensor) -> float:
    """Mean over tokens of the squared change of the block's output, relative to its size: (tokens, hidden)."""
    changed = context.replay("", cut.inflated)
    size = plain.square().sum(-1).clamp(min=torch.finfo(plain.dtype).tiny)
    return float(((changed - plain).square().sum(-1) / size).mean())


def _options(curve: Sequence[Sequence[float]], whole: int, step: int, unit: int) -> list[Option]:
    """Sizes in between lose what lies between, on a logarithmic scale; the whole one loses nothing."""
    points = sorted((int(size), max(float(loss), 1e-12)) for size, loss in curve)
    options = [Option(whole, whole * unit, 0.0)]
    for (low, most), (high, least) in itertools.pairwise(points):
        for i in range(_BETWEEN):
            size = round((low + (high - low) * i / _BETWEEN) / step) * step
            loss = math.exp(math.log(most) + (math.log(least) - math.log(most)) * (size - low) / (high - low))
            options.append(Option(size, size * unit, loss))
    return options + [Option(size, size * unit, loss) for size, loss in points]
