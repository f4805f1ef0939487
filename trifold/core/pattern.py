"""Sparsity patterns: which weights may be dropped together, and which of them to drop, given a score."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from trifold.core.errors import RecipeError

Scope = Literal["row", "matrix"]


@dataclass(frozen=True)
class Pattern:
    """`unstructured`; `N:M`, N of every M consecutive inputs kept; `1xG`, groups of G consecutive inputs of a row
    kept or dropped whole.

    size: weights that are decided together (M, G or 1). keep: N of N:M, else 0.
    """

    text: str
    size: int = 1
    keep: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises RecipeError if it is none."""
        if text == "unstructured":
            return cls(text)
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            keep, of = int(found[1]), int(found[2])
            if 0 < keep < of:
                return cls(text, of, keep)
        elif (found := re.fullmatch(r"1x(\d+)", text)) and int(found[1]) > 0:
            return cls(text, int(found[1]))
        raise RecipeError(f"pattern={text!r} is neither 'unstructured', N:M with 0 < N < M such as '2:4', nor '1xG'")

    @property
    def sparsity(self) -> float | None:
        """The share of weights that N:M drops; None where that is free."""
        return 1 - self.keep / self.size if self.keep else None

    def check(self, in_features: int) -> None:
        """Raises RecipeError if a row of so many weights cannot have the pattern."""
        if self.keep and in_features % self.size:
            raise RecipeError(
                f"in_features={in_features} is not a multiple of {self.size}, so pattern={self.text!r} does not divide "
                "it; use pattern='unstructured' or skip the layer"
            )

    def group_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """(rows, in) -> (rows, groups), summed; a shorter last group counts what it has."""
        return torch.nn.functional.pad(scores, (0, -scores.shape[1] % self.size)).unflatten(1, (-1, self.size)).sum(-1)

    def mask(self, scores: torch.Tensor, sparsity: float, scope: Scope = "row") -> torch.Tensor:
        """scores: (rows, in) of weights, the least of which go -> (rows, in) bool, true where a weight stays.

        Of groups, the sum of the scores counts. sparsity: the share of weights (or groups) that goes, rounded down,
        of each row or of the whole matrix; N:M has its own. Of equal scores the earlier goes.
        """
        if self.keep:
            return _kept(scores.unflatten(1, (-1, self.size)), self.size - self.keep).flatten(1)
        return self.group_mask(self.group_scores(scores), scores.shape[1], sparsity, scope)

    def group_mask(self, scores: torch.Tensor, in_features: int, sparsity: float, scope: Scope) -> torch.Tensor:
        """The same of scores (rows, groups), where groups may have one weight."""
        count = scores.shape[1] if scope == "row" else scores.numel()
        flat = scores if scope == "row" else scores.reshape(1, -1)
        kept = _kept(flat, dropped(sparsity, count)).reshape(scores.shape)
        return self.expand(kept, in_features)

    def expand(self, groups: torch.Tensor, in_features: int) -> torch.Tensor:
        """(rows, groups) -> (rows, in)."""
        return groups.repeat_interleave(self.size, 1)[:, :in_features] if self.size > 1 else groups


def dropped(sparsity: float, count: int) -> int:
    """How many of `count` go."""
    return math.floor(sparsity * count + 1e-9)


def _kept(scores: torch.Tensor, drop: int) -> torch.Tensor:
    """True for all but the `drop` least along the last dimension."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    if drop:
        least = torch.argsort(scores, dim=-1, stable=True)[..., :drop]
        mask.scatter_(-1, least, False)
    return mask


def check_sparsity(sparsity: float, setting: str = "sparsity") -> None:
    """Raises RecipeError unless it is a share below one."""
    if not 0 <= sparsity < 1:
        raise RecipeError(f"{setting}={sparsity} is outside [0, 1); 0.5 drops half of the weights")
