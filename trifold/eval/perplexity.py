"""Perplexity: the exponential of the mean next-token loss inside each window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from trifold.compress.text import Windows
from trifold.eval.forward import Scored, scored_logits


@dataclass(frozen=True)
class PerplexityResult:
    """Loss of one model on one set of windows.

    `loss`: mean nats per token over all windows. `perplexity`: exp(loss). `tokens`: scored predictions.
    `window_losses`: mean nats per token of each window, in order.
    """

    loss: float
    perplexity: float
    tokens: int
    window_losses: tuple[float, ...]

    @classmethod
    def from_windows(cls, sums: Sequence[float], counts: Sequence[int]) -> PerplexityResult:
        """From each window's summed loss (nats) and number of scored predictions."""
        tokens = sum(counts)
        loss = math.fsum(sums) / tokens
        perplexity = math.exp(loss) if not loss > 700 else math.inf  # exp overflows beyond
        means = tuple(total / count for total, count in zip(sums, counts, strict=True))
        return cls(loss, perplexity, tokens, means)


def perplexity(model: nn.Module, windows: Windows, batch_size: int = 1) -> PerplexityResult:
    """Perplexity of `model` on `windows`; with a stride below seqlen each token is scored once.

    Logits are taken to fp32 and losses summed in fp64. A model that gives NaN has a perplexity of NaN.
    """
    sums, counts = [], []
    for scored in scored_logits(model, windows, batch_size):
        sums.append(summed_loss(scored))
        counts.append(len(scored.targets))
    return PerplexityResult.from_windows(sums, counts)


def summed_loss(scored: Scored) -> float:
    """Nats over all scored predictions of one window."""
    return math.fsum(
        nn.functional.cross_entropy(logits, targets, reduction="none").double().sum().item()
        for logits, targets in scored.chunks()
    )
