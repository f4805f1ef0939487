"""How far a compressed model's predictions lie from those of the dense baseline.

Perplexity and divergence come out of one forward pass per model: `evaluate_windows`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from trifold.compress.text import Windows
from trifold.core.errors import InputError
from trifold.eval.forward import Scored, scored_logits
from trifold.eval.perplexity import PerplexityResult, perplexity, summed_loss


class Divergence(NamedTuple):
    """`kl`: mean nats per token of KL(baseline || model). `top1_agreement`: share of predictions with the
    same best token, 0 to 1.
    """

    kl: float
    top1_agreement: float


class WindowScores(NamedTuple):
    """What one pass gives: the model's perplexity and, with a baseline, the baseline's and the divergence."""

    model: PerplexityResult
    baseline: PerplexityResult | None
    divergence: Divergence | None


def divergence(model: nn.Module, baseline: nn.Module, windows: Windows, batch_size: int = 1) -> Divergence:
    """KL(baseline || model) and top-1 agreement over the scored predictions of `windows`.

    Log-probabilities in fp32, sums in fp64. Raises InputError if the vocabularies differ in size.
    """
    scores = evaluate_windows(model, windows, baseline, batch_size)
    assert scores.divergence is not None
    return scores.divergence


def evaluate_windows(
    model: nn.Module, windows: Windows, baseline: nn.Module | None = None, batch_size: int = 1
) -> WindowScores:
    """Perplexity of `model` and, given a `baseline`, also its perplexity and the divergence from it."""
    if baseline is None:
        return WindowScores(perplexity(model, windows, batch_size), None, None)
    losses, baseline_losses, divergences = [], [], []
    agreed, counts = 0, []
    streams = (scored_logits(each, windows, batch_size) for each in (model, baseline))
    for ours, theirs in zip(*streams, strict=True):
        kl, same = summed_divergence(ours, theirs)
        losses.append(summed_loss(ours))
        baseline_losses.append(summed_loss(theirs))
        divergences.append(kl)
        agreed += same
        counts.append(len(ours.targets))
    tokens = sum(counts)
    return WindowScores(
        PerplexityResult.from_windows(losses, counts),
        PerplexityResult.from_windows(baseline_losses, counts),
        Divergence(math.fsum(divergences) / tokens, agreed / tokens),
    )


def summed_divergence(model: Scored, baseline: Scored) -> tuple[float, int]:
    """KL(baseline || model) in nats and equal best tokens, over all scored predictions of one window."""
    ours, theirs = model.logits.shape[-1], baseline.logits.shape[-1]
    if ours != theirs:
        raise InputError(f"vocabularies differ: model {ours}, baseline {theirs}; give the model's own baseline")
    kl, agreed = 0.0, 0
    for (q, _), (p, _) in zip(model.chunks(), baseline.chunks(), strict=True):
        p = p.to(q.device)
        agreed += int((q.argmax(-1) == p.argmax(-1)).sum())
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        prob = log_p.exp()
        terms = torch.where(prob == 0, 0.0, prob * (log_p - log_q))  # 0 log 0 = 0; NaN stays NaN
        kl += terms.sum(dtype=torch.float64).item()
    return kl, agreed
