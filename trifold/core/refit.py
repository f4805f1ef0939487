"""The best values for the weights that stay: one least-squares problem for each row.

With the mask given, the loss (w - q) H (w - q)ᵀ of a row has its minimum over the kept places K at
q_K = H_KK⁻¹ (w H)_K. No order of columns, no approximation; SparseGPT's one pass comes close to it from above.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SYSTEM_ELEMENTS = 2**25  # of the linear systems that are held at once
_DOUBLE_UP_TO = 1024  # kept weights of a row: systems up to this size are solved in float64


def refit(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The values at `mask` with the least loss, zero elsewhere: (out, in), of weight's dtype.

    weight: (out, in), the target. hessian: (in, in) float64, positive definite. mask: (out, in) bool. start:
    (out, in), zero outside the mask; a row whose loss would not fall keeps it. One Cholesky factor for each row:
    in³ / 24 multiplications at 50 %.
    """
    kept = int(mask.sum(1).max()) if len(mask) else 0
    if not kept:
        return torch.zeros_like(weight)
    dtype = torch.float64 if kept <= _DOUBLE_UP_TO else torch.float32
    scale = hessian.diagonal().rsqrt()  # a unit diagonal: what float32 factorises best
    unit = (hessian * scale * scale[:, None]).to(dtype)
    right = ((weight.double() @ hessian) * scale).to(dtype)
    found = torch.empty_like(weight)
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, _SYSTEM_ELEMENTS // kept**2)):
        found[rows] = (_solve(unit, right[rows], mask[rows]) * scale.to(dtype)).to(weight.dtype)
    better = _losses(weight - found, hessian) < _losses(weight - start, hessian)
    return torch.where(better[:, None], found, start)


def _solve(hessian: torch.Tensor, right: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """right (rows, in) -> (rows, in): H_KK⁻¹ right_K at the places K of each row, zero elsewhere."""
    kept = int(mask.sum(1).max())
    places = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :kept]  # kept ones first, in order
    filling = ~mask.gather(1, places)  # rows with fewer
    system = hessian[places[:, :, None], places[:, None, :]]
    system.masked_fill_(filling[:, :, None] | filling[:, None, :], 0.0)
    system.diagonal(dim1=1, dim2=2)[filling] = 1.0
    factor, info = torch.linalg.cholesky_ex(system)
    wanted = right.gather(1, places).masked_fill_(filling, 0.0).unsqueeze(-1)
    solution = torch.cholesky_solve(wanted, factor).squeeze(-1)
    solution[info != 0] = torch.nan  # not better than anything
    return torch.zeros_like(right).scatter_(1, places, solution.masked_fill_(filling, 0.0))


def _losses(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(rows,) float64."""
    difference = difference.double()
    return ((difference @ hessian) * difference).sum(1)


def toward_dense(weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, strength: float) -> torch.Tensor:
    """The weight whose product with the inputs at hand is nearest to the dense model's: W (I + strength D H⁻¹).

    weight: (out, in). hessian: H = X Xᵀ, (in, in) float64, positive definite. drift: D = (X_dense - X) Xᵀ. What is
    fitted to it in the metric H is fitted to the dense targets W X_dense: (W H + W D)_K = (W* H)_K. Li et al. 2025,
    arXiv 2504.02692, take a quarter of it. Where it cannot be computed the weight stays.
    """
    factor, info = torch.linalg.cholesky_ex(hessian)
    if info != 0 or not torch.isfinite(drift.sum()):
        return weight
    missing = weight.double() @ drift  # first: (out, in), where D H⁻¹ would be (in, in)
    return weight + torch.cholesky_solve(missing.T, factor).T.mul_(strength).to(weight.dtype)


def aiming(shapes: Sequence[tuple[int, int]], damping: float, strength: float, then: int) -> int:
    """Bytes for a damped Gram matrix, and weights (out, in) that are aimed at dense targets in it one after the other,
    before `then` bytes are needed for what is done with each."""
    width, largest = shapes[0][1], max(out for out, _ in shapes) * shapes[0][1]
    gram = 8 * width**2
    if not strength:
        return bool(damping) * gram + then
    aimed = gram + max(gram + 16 * largest, 24 * largest)  # torch copies the factor that it solves with
    return bool(damping) * gram + max(aimed, 4 * largest + then)
