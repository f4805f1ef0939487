"""Type II: fewer features of queries and keys, by CR approximation of their product.

Features are kept or dropped where they lie, the same for a key head and all query heads that read it, and in pairs
that the rotary embedding turns together: the selection then commutes with the rotation, as long as every pair keeps
its own frequency. Without rotation any basis will do, and a singular value decomposition gives the best.
Lin et al. 2024, MoDeGPT, arXiv 2408.09632.
"""

from __future__ import annotations

from typing import Literal

import torch

PairScore = Literal["diagonal", "block", "turned"]


def head_grams(
    weight: torch.Tensor, bias: torch.Tensor | None, gram: torch.Tensor, total: torch.Tensor, tokens: int, heads: int
) -> torch.Tensor:
    """(heads, d, d) float64: Σ y yᵀ of each head's outputs y = W x + b.

    weight: (heads * d, in). gram: Σ x xᵀ. total: Σ x, (in,). tokens: how many.
    """
    w = weight.double().reshape(heads, -1, weight.shape[1])
    found = w @ gram.double() @ w.mT
    if bias is not None:
        b = bias.double().reshape(heads, -1, 1)
        mean = w @ total.double()[:, None]
        found = found + mean @ b.mT + b @ mean.mT + tokens * b @ b.mT
    return found


def pair_scores(queries: torch.Tensor, keys: torch.Tensor, score: PairScore = "turned") -> torch.Tensor:
    """(kv heads, d / 2): the squared change of the attention scores if a pair (i, i + d / 2) is dropped alone.

    queries: (heads, d, d), keys: (kv heads, d, d), Gram matrices before the rotation; consecutive query heads share
    a key head. "diagonal": C_Q[ii] C_K[ii] + C_Q[jj] C_K[jj], as published. "block": tr(C_Q,pp C_K,pp), exact
    without rotation. "turned": tr(C_Q,pp) tr(C_K,pp) / 2, the mean of that over all relative positions.
    """
    kv_heads, d = keys.shape[:2]
    q, k = _pair_blocks(queries), _pair_blocks(keys)
    q = q.reshape(kv_heads, -1, d // 2, 2, 2).sum(1)
    if score == "diagonal":
        return (q.diagonal(dim1=-2, dim2=-1) * k.diagonal(dim1=-2, dim2=-1)).sum(-1)
    if score == "block":
        return (q * k).sum((-2, -1))
    traces = (c.diagonal(dim1=-2, dim2=-1).sum(-1) for c in (q, k))
    return 0.5 * next(traces) * next(traces)


def _pair_blocks(grams: torch.Tensor) -> torch.Tensor:
    """(heads, d, d) -> (heads, d / 2, 2, 2)."""
    heads, d, _ = grams.shape
    split = grams.reshape(heads, 2, d // 2, 2, d // 2)
    return split.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)


def strongest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """(kv heads, keep) int64, ascending: the pairs with the highest scores of each head."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


def features(pairs: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(kv heads, pairs) -> (kv heads, 2 * pairs): the features i, then their partners i + head_dim / 2."""
    return torch.cat([pairs, pairs + head_dim // 2], dim=1)


def score_error(queries: torch.Tensor, keys: torch.Tensor, kept: torch.Tensor) -> float:
    """Σ tr(C_Q,RR C_K,RR) over heads: the squared change of the scores of all query and key tokens, R being dropped.

    queries: (heads, d, d). keys: (kv heads, d, d). kept: (kv heads, k) features.
    """
    dropped = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device).scatter(1, kept, False)
    both = (dropped[:, :, None] & dropped[:, None, :]).double()
    q = queries.reshape(len(keys), -1, *queries.shape[1:]).sum(1)
    return float((q * keys * both).sum())


def oblique_bases(queries: torch.Tensor, keys: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Without rotation: (kv heads, keep, d) maps of queries and of keys, whose product of `keep` features is closest.

    The squared change of all scores is the tail of the squared singular values of C_Q^½ C_K^½. queries: (kv heads, d,
    d), summed over the heads that share a key head. keys: (kv heads, d, d). The singular values are divided evenly
    between the two.
    """
    half_q, half_k = square_root(queries), square_root(keys)
    u, s, vh = torch.linalg.svd(half_q @ half_k, full_matrices=False)
    root = s[:, :keep].sqrt()[:, :, None]
    inverse = torch.where(root > 1e-7 * root[:, :1].clamp(min=1e-300), 1 / root, 0.0)
    of_queries = inverse * vh[:, :keep] @ half_k  # (C_Q^½)⁻¹ U Σ = C_K^½ V, with no inverse
    return of_queries, inverse * u[:, :, :keep].mT @ half_q


def square_root(grams: torch.Tensor) -> torch.Tensor:
    """Symmetric roots of (..., d, d) positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(grams)
    return vectors * values.clamp(min=0.0).sqrt()[..., None, :] @ vectors.mT


def tail_energy(queries: torch.Tensor, keys: torch.Tensor, keep: int) -> float:
    """The squared change of the scores under `oblique_bases`."""
    singular = torch.linalg.svdvals(square_root(queries) @ square_root(keys))
    return float(singular[:, keep:].square().sum())
