"""Optimal Brain Surgeon on a quadratic loss: the one solver that GPTQ and SparseGPT share.

The loss of replacing W (out, in) by Q is tr((W - Q) H (W - Q)ᵀ) with the Gram H of the layer's inputs. Fixing
one column at a time and letting the later ones absorb its error is a triangular recursion with the upper
Cholesky factor U of H⁻¹ = UᵀU (Frantar et al. 2022, arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trifold.core.columns import ColumnDecision

Decision = Callable[[int, torch.Tensor], torch.Tensor]

DAMPING_GROWTH = 10.0
DAMPING_TRIES = 6
_ROWS = 256  # of a matrix that are converted at once
_COLUMNS = 512  # of a product that are summed up at once
_SMALL = 256  # rows of a triangle that is not halved any more


class NotFiniteError(ValueError):
    """Statistics that hold NaN or infinity: the model's activations overflow on this text."""


@dataclass(frozen=True)
class Damping:
    """What it took to factorise H. ratio: the multiple of mean(diag H) that was added to the diagonal.

    dead: input features that calibration never saw different from zero. diagonal: even the largest damping
    failed, and H was replaced by its diagonal, which makes the sweep plain rounding.
    """

    ratio: float
    tries: int = 1
    dead: int = 0
    diagonal: bool = False

    @property
    def remarkable(self) -> bool:
        return self.tries > 1 or self.dead > 0 or self.diagonal


def damped(gram: torch.Tensor, ratio: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """H + ratio * mean(diag H) I in float64, dead features first given a diagonal of the mean.

    order: (in,) int64; the features of the result in this order.
    """
    h = gram.to(torch.float64, copy=True) if order is None else gram[order[:, None], order].double()
    values = _damped_diagonal(gram, ratio)
    h.diagonal().copy_(values if order is None else values[order])
    return h


def _damped_diagonal(gram: torch.Tensor, ratio: float) -> torch.Tensor:
    values = gram.diagonal().double()
    alive = values > 0
    mean = values[alive].mean() if alive.any() else torch.ones((), dtype=values.dtype, device=values.device)
    return torch.where(alive, values, mean) + ratio * mean


def inverse_cholesky(
    gram: torch.Tensor,
    ratio: float = 0.01,
    order: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, Damping]:
    """Upper U, (in, in) of `dtype`, with UᵀU = (damped H)⁻¹, computed in float64; and the damping it took.

    order: (in,) int64; H's features are taken in this order, which U then has too. Damping grows tenfold while
    H is not positive definite; at last H is replaced by its diagonal, so a finite Gram never fails. Raises
    NotFiniteError if the Gram holds NaN or infinity.
    """
    if not all_finite(gram):
        raise NotFiniteError("the calibration statistics hold NaN or infinity")
    order = torch.arange(len(gram), device=gram.device) if order is None else order
    dead = int((gram.diagonal() <= 0).sum())
    backwards = order.flip(0)
    for attempt in range(DAMPING_TRIES):
        tried = ratio * DAMPING_GROWTH**attempt if ratio else (0.0 if not attempt else 1e-8 * 100.0**attempt)
        # With H's features reversed and H = L Lᵀ, U is L⁻¹ with its rows and columns reversed.
        lower = damped(gram, tried, backwards).T  # column by column, as LAPACK wants it to work in place
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if info == 0:
            inverse = invert_lower_(lower)
            if all_finite(inverse):
                return _reversed(inverse, dtype), Damping(tried, attempt + 1, dead)
    diagonal = damped(gram, ratio).diagonal()[order]
    factor = torch.diag(diagonal.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()).to(dtype)
    return factor, Damping(ratio, DAMPING_TRIES, dead, diagonal=True)


def _reversed(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy (n, n) of `dtype` with the order of rows and columns reversed, row by row in memory."""
    found = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for start in range(0, len(matrix), _ROWS):
        stop = min(start + _ROWS, len(matrix))
        found[len(matrix) - stop : len(matrix) - start] = matrix[start:stop].flip(0, 1)
    return found


def invert_lower_(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular (n, n), whose upper triangle holds zeros, in its place.

    By halves: of [[A, 0], [C, B]] it is [[A^-1, 0], [-B^-1 C A^-1, B^-1]]. No product meets a large block of zeros.
    """
    if len(lower) <= _SMALL:
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
    first, corner, last = _quarters(lower)
    invert_lower_(first)
    invert_lower_(last)
    _lower_times_(last, corner)
    _times_lower_(corner, first)
    corner.neg_()
    return lower


def _quarters(lower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = len(lower) // 2
    return lower[:half, :half], lower[half:, :half], lower[half:, half:]


def _lower_times_(lower: torch.Tensor, matrix: torch.Tensor) -> None:
    """matrix = lower @ matrix, in its place: the last rows first, for they need the others as they were."""
    if len(lower) <= _SMALL:
        matrix.copy_(lower @ matrix)
        return
    first, corner, last = _quarters(lower)
    above, below = matrix.tensor_split([len(first)])
    _lower_times_(last, below)
    below.addmm_(corner, above)
    _lower_times_(first, above)


def _times_lower_(matrix: torch.Tensor, lower: torch.Tensor) -> None:
    """matrix = matrix @ lower, in its place."""
    if len(lower) <= _SMALL:
        matrix.copy_(matrix @ lower)
        return
    first, corner, last = _quarters(lower)
    before, after = matrix.tensor_split([len(first)], dim=1)
    _times_lower_(before, first)
    before.addmm_(after, corner)
    _times_lower_(after, last)


def scaled(gram: torch.Tensor, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """`damped` H over the mean of its diagonal, (in, in) of `dtype`."""
    values = _damped_diagonal(gram, ratio)
    h = _divided(gram, values.mean(), dtype)
    h.diagonal().copy_(values / values.mean())
    return h


def all_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no element is NaN or infinite, once rounded to `dtype` if one is given. Makes no tensor of answers."""
    if not tensor.numel():
        return True
    tensor = tensor.mT if tensor.ndim == 2 and not tensor.is_contiguous() else tensor  # which aminmax would copy
    return all(bool(torch.isfinite(extreme.to(dtype or tensor.dtype))) for extreme in tensor.aminmax())


def _divided(matrix: torch.Tensor, divisor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """matrix / divisor, rounded to `dtype`, without a whole quotient of matrix's own."""
    found = torch.empty_like(matrix, dtype=dtype)
    for rows, result in zip(matrix.split(_ROWS), found.split(_ROWS), strict=True):
        result.copy_(rows / divisor)
    return found


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    decide: Decision,
    block: int = 128,
    before_block: Callable[[int, int, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fix the columns from first to last, each with the error of the earlier ones folded in.

    weight: (out, in); upper: (in, in) of the same dtype. `decide(j, column)` gets column j, (out,), as the
    earlier decisions left it and returns what is kept of it. `before_block(start, stop, columns)` sees the
    current (stop - start, out) columns of each lazily updated block, for decisions that look at several.
    Returns the decided weight (out, in) and the loss of each row (out,): exactly
    diag((W - Q) (UᵀU)⁻¹ (W - Q)ᵀ). The block size changes the speed, not the result.
    """
    columns, upper = weight.T.contiguous().clone(), upper.contiguous()
    loss = torch.zeros_like(columns[0])
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        current, factor = columns[start:stop], upper[start:stop, start:stop]
        if before_block is not None:
            before_block(start, stop, current)
        errors = torch.zeros_like(current)
        if not (isinstance(decide, ColumnDecision) and decide.fix(start, current, errors, factor)):
            _fix(start, current, errors, factor, decide)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.square().sum(0)
    return columns.T.contiguous(), loss


def _fix(start: int, current: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, decide: Decision) -> None:
    along, pivots = errors.T, factor.diagonal().tolist()
    rows = zip(current, errors, factor.unbind(1), pivots, strict=True)
    for j, (column, error, influence, pivot) in enumerate(rows, start):
        live = torch.addmv(column, along, influence, alpha=-1)  # later columns have no error yet
        decided = decide(j, live)
        torch.sub(live, decided, out=error).div_(pivot)
        column.copy_(decided)


def quadratic_loss(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(D H Dᵀ), a float64 scalar. difference: (out, in), whose dtype the products have; gram: (in, in), symmetric.

    Only the upper triangle of H is read, and half as much multiplied; some columns at a time, for neither H in another
    dtype nor D H has to be in memory as a whole.
    """
    size = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    loss = torch.zeros((), dtype=torch.float64, device=gram.device)
    for start in range(0, len(gram), _COLUMNS):
        stop = min(start + _COLUMNS, len(gram))
        rows = _divided(gram[start:stop, start:], size, difference.dtype)
        rows[:, stop - start :] *= 2  # each stands for its mirror, too
        product = difference[:, start:] @ rows.T
        loss += product.mul_(difference[:, start:stop]).sum(dtype=torch.float64)
    return loss * size


def output_losses(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor | None) -> tuple[float, float]:
    """tr((W - Q) H (W - Q)ᵀ) and tr(W H Wᵀ), those of some rows being a share of the sums over all; H = I for None."""

    def loss(difference: torch.Tensor) -> float:
        if gram is None:
            return float(difference.square().sum(dtype=torch.float64))
        return float(quadratic_loss(difference, gram))

    return loss(weight - approximation), loss(weight)


def ratio_of(error: float, total: float) -> float:
    """The first of `output_losses` over the second."""
    return max(error, 0.0) / total if total > 0 else float(error > 0)


def relative_error(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor | None) -> float:
    """tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ): the squared output error over the squared output; H = I for None."""
    return ratio_of(*output_losses(weight, approximation, gram))
