"""Type I: fewer features inside an MLP, by the Nyström approximation of their Gram matrix.

Of C = Σ h hᵀ, with h the input of the down projection, features J are kept: their rows of gate and up, and the down
projection that is best on them, W C[:, J] C[J, J]⁻¹. Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large
Language Model Compression", arXiv 2408.09632, choose J by ridge leverage scores, which know nothing of W. The cost of
removing a feature from W itself, as in Optimal Brain Surgeon, does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trifold.core.obs import DAMPING_GROWTH, DAMPING_TRIES, NotFiniteError, damped

_ROUNDS = 16  # in which features go until the fewest are left, with costs taken anew
_LEAST_RATIO = 1e-12


def factor(gram: torch.Tensor, ratio: float) -> torch.Tensor:
    """Lower Cholesky factor of gram + ratio * mean(diag) I, (n, n) float64, with more where that is singular.

    Raises NotFiniteError if the Gram matrix holds NaN or infinity.
    """
    if not torch.isfinite(gram.sum()):
        raise NotFiniteError("the Gram matrix of its inputs is not finite")
    h, added = damped(gram, ratio), 0.0
    mean = float(h.diagonal().mean()) if len(h) else 1.0
    for _ in range(DAMPING_TRIES * 2):
        lower, info = torch.linalg.cholesky_ex(h)
        if not info:
            return lower
        more = max(_LEAST_RATIO, (added or ratio) * DAMPING_GROWTH)
        h.diagonal().add_((more - added) * mean)
        added = more
    return h.diagonal().sqrt().diag()


def leverage(gram: torch.Tensor, ridge: float = 1e-2) -> torch.Tensor:
    """diag(C (C + λ I)⁻¹), (n,) float64 in 0..1, with λ = ridge * mean(diag C); 0 of features that are always zero."""
    c = gram.double()
    lam = ridge * c.diagonal().mean().clamp(min=torch.finfo(c.dtype).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(c + lam * torch.eye(len(c), dtype=c.dtype, device=c.device)))
    return (1 - lam * inverse.diagonal()).clamp(min=0.0)


def refit(gram: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
    """(out, k) float64: the weight on the kept inputs that comes closest to W on all of them: least
    tr((W - W'P) C (W - W'P)ᵀ).

    gram: (n, n) float64. weight: (out, n). index: (k,) int64. damping: a ridge on how far W' is from W[:, J], as a
    multiple of the mean of diag(C); features without data so keep their weights.
    """
    w, lost = weight.double(), torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    lost[index] = False
    rest = lost.nonzero().squeeze(1)
    kept = gram[index[:, None], index].double()
    moved = w[:, rest] @ gram[rest[:, None], index].double()  # what the lost ones gave, seen from the kept
    return w[:, index] + torch.cholesky_solve(moved.T, factor(kept, damping)).T


def lost_energy(gram: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> float:
    """tr((W - W'P) C (W - W'P)ᵀ): the squared output error over all of the calibration tokens."""
    change = weight.double().clone()
    change[:, index] -= new
    return float(((change @ gram.double()) * change).sum().clamp(min=0.0))


def by_leverage(gram: torch.Tensor, keeps: Sequence[int], ridge: float = 1e-2) -> Iterator[torch.Tensor]:
    """For each size the features with the highest scores, (k,) int64 ascending."""
    order = leverage(gram, ridge).argsort(descending=True, stable=True)
    for keep in keeps:
        yield order[:keep].sort().values


def by_removal(
    gram: torch.Tensor, weight: torch.Tensor, keeps: Sequence[int], damping: float = 1e-4
) -> Iterator[torch.Tensor]:
    """For each size, in descending order, the features that are left when the cheapest go first.

    Removing feature i, with all others refitted, costs ‖W[:, i]‖² / [C⁻¹]ᵢᵢ. Features go in rounds, and what is left
    is refitted between them, so that the sets are nested. Yields (k,) int64, ascending.
    """
    if list(keeps) != sorted(keeps, reverse=True):
        raise ValueError(f"sizes {list(keeps)} are not in descending order")
    left, w = torch.arange(len(gram), device=gram.device), weight.double().clone()
    inverse = torch.cholesky_inverse(factor(gram, damping))
    unused = gram.diagonal() <= 0
    most = max(1, -(-(len(gram) - min(keeps, default=len(gram))) // _ROUNDS))
    for keep in keeps:
        while len(left) > keep:
            cost = w.square().sum(0) / inverse.diagonal()
            cost[unused[left]] = 0.0
            order = cost.argsort(stable=True)
            gone, stays = order[: min(most, len(left) - keep)], order[min(most, len(left) - keep) :].sort().values
            across = inverse[gone[:, None], stays]
            share = torch.linalg.solve(inverse[gone[:, None], gone], across)
            w = w[:, stays] - w[:, gone] @ share
            inverse = inverse[stays[:, None], stays].addmm_(across.T, share, alpha=-1)
            left = left[stays]
        yield left.clone()
