"""The three approximations on the linears of a block: which weights a smaller dimension leaves, and what it loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trifold.core.dimensions import Attention, FeedForward, Part
from trifold.core.method import BlockContext, Statistics
from trifold.lowrank.modegpt import nystrom, pairs, values
from trifold.lowrank.modegpt.shares import Dims, grain

ValueScore = Literal["alone", "joint", "outputs"]
Inside = Literal["leverage", "removal"]

_PROJECTIONS: tuple[Part, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Cut:
    """One dimension made smaller. weights, parameters: of the smaller linears, by name. inflated: (out, in) of the
    size they had, with which the block does nearly the same as with the smaller ones. error: relative and squared,
    of what the approximation is about. frequencies: (kv heads, pairs), of a cut of queries and keys."""

    weights: Mapping[str, torch.Tensor]
    inflated: Mapping[str, torch.Tensor]
    error: float
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frequencies: torch.Tensor | None = None


class Cutter:
    """What can be cut of one block, and how. attention, feed_forward: None where the block has none, or not all of
    its linears are to be compressed."""

    def __init__(
        self,
        context: BlockContext,
        inside: Inside,
        pair_score: pairs.PairScore,
        value_score: ValueScore,
        damping: float,
    ) -> None:
        self.context, self.inside, self.damping = context, inside, damping
        self.pair_score, self.value_score = pair_score, value_score
        known = context.topology.dimensions
        self.attention: Attention | None = known.attention
        self.feed_forward: FeedForward | None = known.feed_forward
        if self.attention and not all(self.attention.name(part) in context.weights for part in ("q", "k", "v", "o")):
            self.attention = None
        if self.feed_forward and not {self.feed_forward.down, *self.feed_forward.inward} <= context.weights.keys():
            self.feed_forward = None

    # -- sizes -----------------------------------------------------------------------------------------

    def whole(self) -> Dims:
        """The sizes that can be cut. Queries and keys with a norm of their own cannot: it divides by all features."""
        found: Dims = {}
        if self.attention:
            found = dict.fromkeys(("v",) if self.attention.norms else ("qk", "v"), self.attention.head_dim)
        if self.feed_forward:
            found["mlp"] = self.context.weights[self.feed_forward.down].shape[1]
        return found

    def steps(self) -> Dims:
        """What each size is a multiple of."""
        found = {}
        for part, size in self.whole().items():
            found[part] = grain(size, 64, 64) if part == "mlp" else grain(size, 8, 8, 2 if part == "qk" else 1)
        return found

    def units(self) -> Dims:
        """Weights that one feature takes."""
        shape = {name: weight.shape for name, weight in self.context.weights.items()}
        found: Dims = {}
        if self.attention:
            a = self.attention
            found["qk"] = a.heads * shape[a.name("q")][1] + a.kv_heads * shape[a.name("k")][1]
            found["v"] = a.heads * shape[a.name("o")][0] + a.kv_heads * shape[a.name("v")][1]
        if self.feed_forward:
            ff = self.feed_forward
            rows = 2 if ff.gate == ff.up else 1
            found["mlp"] = shape[ff.down][0] + sum(rows * shape[name][1] for name in ff.inward)
        return {part: found[part] for part in self.whole()}

    # -- cuts ------------------------------------------------------------------------------------------

    def cuts(self, part: str, sizes: Sequence[int]) -> Iterator[Cut]:
        """The cuts of a part to these sizes, which descend."""
        yield from {"qk": self._queries_and_keys, "v": self._values, "mlp": self._inside}[part](sizes)

    def _statistics(self, name: str) -> Statistics:
        return self.context.statistics[self.context.inputs[name]]

    def part(self, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a projection, also where it is rows of another linear."""
        a = self.attention
        assert a is not None
        rows, name = a.rows(a.head_dim, a.head_dim)[part], a.name(part)
        bias = self.context.parameters.get(f"{name}.bias")
        return self.context.weights[name][rows], None if bias is None else bias[rows]

    def _head_grams(self, part: Part, heads: int) -> torch.Tensor:
        assert self.attention is not None
        seen = self._statistics(self.attention.name(part))
        return pairs.head_grams(*self.part(part), seen.gram, seen.total, seen.tokens, heads)

    def _queries_and_keys(self, sizes: Sequence[int]) -> Iterator[Cut]:
        a = self.attention
        assert a is not None
        q, k = self._head_grams("q", a.heads), self._head_grams("k", a.kv_heads)
        summed = q.reshape(a.kv_heads, a.groups, *q.shape[1:]).sum(1)
        energy = max(float((summed * k).sum()), 1e-300)
        scores = pairs.pair_scores(q, k, self.pair_score) if a.rotary else None
        for size in sizes:
            index = None
            if scores is not None:
                index = pairs.strongest(scores, size // 2)
                kept = pairs.features(index, a.head_dim)
                of_q = of_k = torch.nn.functional.one_hot(kept, a.head_dim).to(q.dtype)
                lost = pairs.score_error(q, k, kept)
            else:
                of_q, of_k = pairs.oblique_bases(summed, k, size)
                lost = pairs.tail_energy(summed, k, size)
            mapped, biases = {}, {}
            for part, maps in (("q", of_q.repeat_interleave(a.groups, 0)), ("k", of_k)):
                mapped[part], biases[part] = self._mapped(part, maps)  # type: ignore[arg-type]
            through = (of_k.mT @ of_q).repeat_interleave(a.groups, 0)  # all of it in queries of the old size
            inflated = self._joined({"q": self._mapped("q", through)[0]})
            yield Cut(mapped, inflated, lost / energy, {n: b for n, b in biases.items() if b is not None}, index)

    def _values(self, sizes: Sequence[int]) -> Iterator[Cut]:
        a = self.attention
        assert a is not None
        o, name = self.context.weights[a.name("o")], a.name("o")
        outputs = self._statistics(name).gram
        if self.value_score == "outputs":
            own = outputs.reshape(a.heads, a.head_dim, a.heads, a.head_dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            grams = own.reshape(a.kv_heads, a.groups, a.head_dim, a.head_dim).sum(1)
        else:
            grams = self._head_grams("v", a.kv_heads)
        energy = max(float(((o.double() @ outputs) * o).sum()), 1e-300)
        for size in sizes:
            maps, bases, _ = values.value_bases(grams, None if self.value_score == "alone" else o, size)
            if self.value_score == "outputs":
                narrow = values.refit_output(outputs, o, maps, bases, self.damping)
            else:
                narrow = values.narrowed(o, bases)
            wide = values.widened(narrow, maps)
            weight, bias = self._mapped("v", maps.mT)
            parameters = {} if bias is None else {"v": bias}
            lost = values.output_error(outputs, o, wide) / energy
            yield Cut({"v": weight, name: narrow.float()}, {name: wide.float()}, lost, parameters)

    def _mapped(self, part: Part, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a projection followed by (heads, size, head_dim) maps of its heads."""
        weight, bias = self.part(part)
        heads, size, d = maps.shape
        rows = (maps @ weight.double().reshape(heads, d, -1)).reshape(heads * size, -1).float()
        shifted = None if bias is None else (maps @ bias.double().reshape(heads, d, 1)).reshape(-1).to(bias.dtype)
        return rows, shifted

    def _joined(self, parts: Mapping[Part, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of projections by the names of their linears; what is not given stays."""
        a = self.attention
        assert a is not None
        if not a.fused:
            return {a.name(part): weight for part, weight in parts.items()}
        return {a.name("q"): torch.cat([parts[p] if p in parts else self.part(p)[0] for p in _PROJECTIONS])}

    def assembled(self, cuts: Mapping[str, Cut]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights and biases of the whole attention after cuts of "qk", "v" or both."""
        a = self.attention
        assert a is not None
        found = {name: weight for cut in cuts.values() for name, weight in cut.weights.items()}
        biases = {name: bias for cut in cuts.values() for name, bias in cut.parameters.items()}
        projections: dict[Part, torch.Tensor] = {part: found.pop(part) for part in _PROJECTIONS if part in found}
        weights = {**self._joined(projections), **found} if projections else found
        if a.fused and biases:
            own = {part: self.part(part)[1] for part in _PROJECTIONS}
            joined = [biases.get(part, bias) for part, bias in own.items()]
            return weights, {f"{a.name('q')}.bias": torch.cat([bias for bias in joined if bias is not None])}
        return weights, {f"{a.name(part)}.bias": bias for part, bias in biases.items()}  # type: ignore[arg-type]

    def _inside(self, sizes: Sequence[int]) -> Iterator[Cut]:
        ff = self.feed_forward
        assert ff is not None
        down, gram = self.context.weights[ff.down], self._statistics(ff.down).gram
        energy = max(float(((down.double() @ gram) * down).sum()), 1e-300)
        chosen = (
            nystrom.by_leverage(gram, sizes)
            if self.inside == "leverage"
            else nystrom.by_removal(gram, down, sizes, self.damping)
        )
        for index in chosen:
            new = nystrom.refit(gram, down, index, self.damping)
            lost = nystrom.lost_energy(gram, down, index, new) / energy
            wide = torch.zeros_like(down).index_copy_(1, index, new.to(down.dtype))
            rows = torch.cat([index, index + len(gram)]) if ff.gate == ff.up else index
            weights = {name: self.context.weights[name][rows] for name in ff.inward}
            biases = {f"{name}.bias": self.context.parameters.get(f"{name}.bias") for name in ff.inward}
            parameters: dict[str, Any] = {name: bias[rows] for name, bias in biases.items() if bias is not None}
            yield Cut({**weights, ff.down: new.float()}, {ff.down: wide}, lost, parameters)
