"""How much each block keeps: by its influence on the residual stream as published, or by measured curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trifold.core.allocation import Option, allocate
from trifold.core.errors import RecipeError

Dims = dict[str, int]
"""What is left of a block: features of a query and key head ("qk"), of a value head ("v"), of the MLP ("mlp"). What
is absent stays whole."""


def influence_shares(influence: Sequence[float], share: float, temperature: float, most: float) -> list[float]:
    """What each block gives up: L * share * softmax(-influence / temperature), and no more than `most`.

    influence: 1 - mean cosine of a block's input and output. What goes beyond `most` is shared out again, in the same
    proportion, so that the mean is `share` unless that exceeds `most`.
    """
    if not influence or share >= most:
        return [min(share, most)] * len(influence)
    top = max(-value / temperature for value in influence)
    weights = [math.exp(-value / temperature - top) for value in influence]
    shares, free = [0.0] * len(weights), set(range(len(weights)))
    rest = share * len(weights)
    while free:
        total = sum(weights[i] for i in free)
        if total <= 0:
            return [most if i not in free else rest / len(free) for i in range(len(weights))]
        over = {i for i in free if rest * weights[i] / total > most}
        for i in over or free:
            shares[i] = most if over else rest * weights[i] / total
        rest -= most * len(over)
        free = free - over if over else set()
    return shares


def grain(size: int, parts: int, largest: int, least: int = 1) -> int:
    """The multiple that a dimension is rounded to: a power of two, at most `largest` and size / parts."""
    fits = max(size // parts, 1)
    return max(least, min(largest, 1 << (fits.bit_length() - 1)))


def stepped(size: int, share: float, step: int) -> int:
    """The multiple of `step` next to share * size; at least one of them, at most the size itself."""
    return size if share >= 1 else min(size, max(step, int(share * size / step + 0.5) * step))


def by_curves(curves: Sequence[Mapping[str, Sequence[Option]]], budget: float) -> list[Dims]:
    """For each block the sizes that lose the least together, at a sum of costs of at most `budget`.

    curves: for each block, part -> options whose settings are sizes.
    """
    named = {f"{block}.{part}": options for block, parts in enumerate(curves) for part, options in parts.items()}
    found: list[Dims] = [{} for _ in curves]
    for name, size in allocate(named, budget).items():
        block, _, part = name.partition(".")
        found[int(block)][part] = int(size)
    return found


def fitted(
    dims: Sequence[Dims],
    whole: Sequence[Dims],
    steps: Sequence[Dims],
    unit: Sequence[Mapping[str, int]],
    budget: float,
) -> list[Dims]:
    """The sizes nearest to `dims` whose cost comes closest to the budget from below, changed a step at a time.

    whole: full sizes. steps: by how much each may change. unit: weights for one of each size. The widest dimensions
    give or take first, since a step is the least of them. Raises RecipeError if the smallest sizes exceed the budget.
    """
    found = [dict(d) for d in dims]
    places = sorted(
        ((block, part) for block, parts in enumerate(found) for part in parts),
        key=lambda place: -whole[place[0]][place[1]] / steps[place[0]][place[1]],
    )
    spent = sum(size * unit[b][p] for b, parts in enumerate(found) for p, size in parts.items())
    while spent > budget:
        before = spent
        for block, part in places:
            step = steps[block][part]
            if spent > budget and found[block][part] > step:
                smaller = (found[block][part] - 1) // step * step
                spent -= (found[block][part] - smaller) * unit[block][part]
                found[block][part] = smaller
        if spent == before:
            raise RecipeError("less is left to keep than the least that the blocks can be cut to; keep more")
    for block, part in places * 2:
        size = min(
            found[block][part] // steps[block][part] * steps[block][part] + steps[block][part], whole[block][part]
        )
        more = (size - found[block][part]) * unit[block][part]
        if 0 < more <= budget - spent:
            found[block][part], spent = size, spent + more
    return found
