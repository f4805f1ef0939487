"""How far two evaluations of the same things differ, with the standard error of the pairing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from trifold.core.errors import InputError

_BLOCKS = 100  # enough for a standard error within some 7 %


def paired_difference(a_losses: Sequence[float], b_losses: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of `a - b` over the same windows (nats per token), the window being the unit.

    The standard error of a single window is NaN. Raises InputError unless both have as many, at least one.
    """
    if len(a_losses) != len(b_losses) or not a_losses:
        counts = f"{len(a_losses)} and {len(b_losses)} window losses"
        raise InputError(f"{counts}: give two evaluations of the same windows")
    differences = [a - b for a, b in zip(a_losses, b_losses, strict=True)]
    if len(differences) == 1:
        return differences[0], math.nan
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def jackknife_difference(
    a_items: Sequence[Any], b_items: Sequence[Any], aggregate: Callable[[list[Any]], float]
) -> tuple[float, float]:
    """`aggregate(a) - aggregate(b)` and its standard error over the same documents, for a smooth `aggregate`.

    Leaves out one document at a time, or, of more than 100, one of 100 interleaved blocks (Efron & Stein 1981,
    doi:10.1214/aos/1176345462). For a mean and up to 100 documents it is `paired_difference`. Raises InputError
    unless both have as many, at least two.
    """
    count = len(a_items)
    if len(b_items) != count or count < 2:
        raise InputError(f"{count} and {len(b_items)} documents: give two evaluations of the same two or more")
    blocks = min(count, _BLOCKS)

    def difference(left_out: int | None) -> float:
        kept = [i for i in range(count) if left_out is None or i % blocks != left_out]
        return aggregate([a_items[i] for i in kept]) - aggregate([b_items[i] for i in kept])

    partial = [difference(block) for block in range(blocks)]
    return difference(None), (blocks - 1) / math.sqrt(blocks) * statistics.stdev(partial)
