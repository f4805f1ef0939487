"""Random choices that remember how likely they were."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """A stream of seeded choices; `nats` is the negative logarithm of the probability of all of them so far.

    Where the choices can be read off the text that they lead to, as in everything this package writes, that is
    the exact information content of the text. Only `random.random` is drawn from, which Python promises to keep.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random
        self.nats = 0.0

    def one_of(self, options: Sequence[T]) -> T:
        """One of several, all equally likely."""
        self.nats += math.log(len(options))
        return options[int(self._random() * len(options))]

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included, all equally likely."""
        return self.one_of(range(low, high + 1))

    def flip(self, probability: float) -> bool:
        """True with this probability."""
        return self.weighted({True: probability, False: 1 - probability})

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of the keys, each with the probability that its value is of the sum of all."""
        options, shares = list(weights), list(itertools.accumulate(weights.values()))
        place = bisect.bisect_right(shares, self._random() * shares[-1])
        option = options[min(place, len(options) - 1)]  # rounding may reach the very end
        self.nats -= math.log(weights[option] / shares[-1])
        return option

    def distinct(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones in order, every ordered selection equally likely."""
        left, taken = list(options), []
        for _ in range(count):
            self.nats += math.log(len(left))
            taken.append(left.pop(int(self._random() * len(left))))
        return taken
