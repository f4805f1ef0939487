"""OWL: blocks with more outliers keep more weights.

Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
arXiv 2310.05175. An outlier is a weight whose Wanda score |W| ||x|| exceeds `threshold` times the mean of its block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def outlier_share(scores: Sequence[torch.Tensor], threshold: float = 5.0) -> float:
    """Wanda scores of the linears of one block, not squared -> the share of outliers, in percent."""
    every = torch.cat([score.reshape(-1) for score in scores])
    return 100 * float((every > threshold * every.double().mean()).double().mean())


def owl(shares: Sequence[float], sparsity: float, spread: float = 0.08) -> list[float]:
    """Shares of outliers by block -> sparsities, whose mean is `sparsity` and which differ by 2 `spread` at most."""
    low, high = min(shares), max(shares)
    more = [2 * spread * (share - low) / (high - low) if high > low else 0.0 for share in shares]
    mean = sum(more) / len(more)
    return [sparsity - (each - mean) for each in more]
