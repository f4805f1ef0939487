"""From the best subspace to two stored factors: pivot rows, rotation, rounding in the order of the data.

*Pivots.* A matrix of rank r has r rows of which all others are combinations. With those rows as the right factor the
left one is an identity there, which costs nothing: r (out + in - r) numbers instead of r (out + in), and never more
than the dense weight (Zhao et al. 2025, "Pivoting Factorization", arXiv 2501.19090).

*Data order.* The right factor meets the inputs. It is stored, that is rounded, first; then the left one is solved on
what the stored right one really gives, and rounded with the Gram matrix of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.canonical import Canonical, Chain, Dense, Identity, LowRank, Split
from trifold.core.method import METHODS, LayerMethod, LayerProblem
from trifold.core.scheme import SCALE_DTYPES, ScaleDtype, Scheme
from trifold.lowrank.metric import Metric

_SWAPS = 4096  # of pivot rows for others, at most


@dataclass(frozen=True)
class Layout:
    """How a product of two factors is stored. scheme: that both are rounded to; None keeps them in `dtype`. pivot:
    whether rows of the weight are the right factor. rounder: name of the method that rounds."""

    scheme: Scheme | None = None
    dtype: ScaleDtype = "bfloat16"
    pivot: bool = True
    rounder: str = "gptq"

    def sketch(self, shape: tuple[int, int], rank: int) -> Canonical:
        """Factors of a weight (out, in) on the meta device."""
        rows, columns = shape
        if not self.pivot and self.scheme is None:
            return LowRank(*(torch.empty(s, dtype=self._dtype, device="meta") for s in ((rows, rank), (rank, columns))))
        right = self.sketch_leaf(rank, columns)
        if not self.pivot:
            return Chain((self.sketch_leaf(rows, rank), right))
        if rank == rows:
            return right
        index = torch.zeros(rows, dtype=torch.int64)
        index[rank:] = 1
        return Chain((Split(0, index, (Identity(rank), self.sketch_leaf(rows - rank, rank))), right))

    def sketch_leaf(self, rows: int, columns: int) -> Canonical:
        """One factor on the meta device, or a weight that is kept whole."""
        if self.scheme is None or columns == 1:
            return Dense(torch.empty(rows, columns, dtype=self._dtype, device="meta"))
        return self._method("rtn").sketch((rows, columns), self.scheme)

    def store(self, values: torch.Tensor, gram: torch.Tensor | None) -> Canonical:
        """A factor (rows, columns) as it is stored: a single column, which no format packs, is not rounded. gram: of
        what it meets; None rounds to nearest."""
        if self.scheme is None or values.shape[1] == 1:
            return Dense(values.to(self._dtype))
        problem = LayerProblem({"": values.float()}, {"": self.scheme}, gram)
        return self._method("rtn" if gram is None else self.rounder).solve(problem).canonical[""]

    @property
    def _dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.dtype]

    @staticmethod
    def _method(name: str) -> LayerMethod:
        method = METHODS.get(name)()
        assert isinstance(method, LayerMethod)
        return method


def factorise(target: torch.Tensor, metric: Metric, rank: int, layout: Layout, refit: bool = True) -> Canonical:
    """Two factors whose product is nearest to `target`, (out, in), in the metric.

    refit: solve the left factor again on the stored right one. Without, both are the exact ones, rounded.
    """
    basis = metric.basis(target, rank)
    seen = metric if refit else None
    right = basis.T @ target.double()
    if layout.pivot:
        return _pivoted(target, basis, right, layout, metric, refit)
    if layout.scheme is not None:
        turn = rotation(rank, basis)
        basis, right = basis @ turn, turn.T @ right
    stored = layout.store(right, metric.gram if seen else None)
    left = _refitted(target, basis, stored, metric) if refit else basis
    inner = metric.inner(stored.dequantize()) if seen and layout.scheme is not None else None
    found = layout.store(left, inner)
    if isinstance(found, Dense) and isinstance(stored, Dense):
        return LowRank(found.values, stored.values)
    return Chain((found, stored))


def _pivoted(
    target: torch.Tensor, basis: torch.Tensor, right: torch.Tensor, layout: Layout, metric: Metric, refit: bool
) -> Canonical:
    rows, coefficients = pivots(basis)
    others = torch.ones(len(basis), dtype=torch.bool, device=basis.device)
    others[rows] = False
    stored = layout.store(basis[rows] @ right, metric.gram if refit else None)
    if not others.any():
        return stored
    left = _refitted(target[others], coefficients, stored, metric) if refit else coefficients
    inner = metric.inner(stored.dequantize()) if refit and layout.scheme is not None else None
    return Chain((Split(0, others.long(), (Identity(len(rows)), layout.store(left, inner))), stored))


def _refitted(target: torch.Tensor, left: torch.Tensor, stored: Canonical, metric: Metric) -> torch.Tensor:
    """The left factor solved on the stored right one, where that is possible and better."""
    right = stored.dequantize().double()
    found = metric.left_for(target, right)
    if found is None or not bool(torch.isfinite(found).all()):
        return left
    better = metric.loss(target - found @ right) < metric.loss(target - left @ right)
    return found if better else left


def pivots(basis: torch.Tensor, largest: float = 1.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of an orthonormal basis (out, rank) of which the others are combinations with small coefficients.

    Returns their numbers (rank,) int64, rising, and the coefficients of the others, (out - rank, rank). Gaussian
    elimination finds rows, then swaps make the volume they span larger until no coefficient is above `largest`.
    """
    count, rank = basis.shape
    order, _, _ = torch.linalg.lu(basis)
    order = order.argmax(0)  # row i of what is eliminated is row order[i] of the basis
    chosen, others = order[:rank].clone(), order[rank:].clone()
    coefficients = torch.linalg.solve(basis[chosen].T, basis[others].T).T
    for _ in range(_SWAPS if count > rank else 0):
        extremes = [divmod(int(place), rank) for place in (coefficients.argmax(), coefficients.argmin())]
        row, column = max(extremes, key=lambda place: abs(float(coefficients[place])))
        pivot = float(coefficients[row, column])
        if abs(pivot) <= largest:
            break
        above, beside = coefficients[row].clone(), coefficients[:, column].clone()
        above[column] -= 1
        beside[row] += 1
        coefficients.addr_(beside, above, alpha=-1 / pivot)
        chosen[column], others[row] = others[row].clone(), chosen[column].clone()
    chosen, places = chosen.sort()
    others, lines = others.sort()
    return chosen, coefficients[lines][:, places]


def rotation(size: int, like: torch.Tensor) -> torch.Tensor:
    """A random orthogonal matrix, the same for the same size: it makes the entries of both factors even in size."""
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return torch.linalg.qr(noise)[0].to(like)
