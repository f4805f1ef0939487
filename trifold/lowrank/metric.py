"""How the inputs of a layer weigh errors, and what of a weight matters most by it.

The squared output error of replacing W (out, in) by Ŵ is tr((W - Ŵ) H (W - Ŵ)ᵀ) with the Gram matrix H = X Xᵀ of the
inputs. With any root R Rᵀ = H it is |(W - Ŵ) R|², so the best Ŵ of rank r has [W R]_r = Ŵ R, and its error is the sum
of the smaller squared singular values of W R (Wang et al. 2024, "SVD-LLM", arXiv 2403.07378). The left singular vectors
U of W R are the eigenvectors of W H Wᵀ, the Gram matrix of the outputs: Ŵ = U_r U_rᵀ W needs neither a root of H nor
its inverse. That is the projection on principal components of the outputs (Yu and Wu 2023, AAAI; LoRD,
Kaushal et al. 2023, arXiv 2309.14021), which are the better ones of the two for a nearly singular H.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from trifold.core.obs import NotFiniteError, damped


@dataclass(frozen=True, eq=False)
class Metric:
    """gram: H, (in, in) float64, positive semidefinite."""

    gram: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float = 0.0) -> Metric:
        """gram: (in, in). damping: multiple of mean(diag H) that is added to the diagonal; features that were never
        different from zero then count like the others. Raises NotFiniteError if it holds NaN or infinity."""
        if not bool(torch.isfinite(gram.sum())):  # all() would make copies
            raise NotFiniteError("the Gram matrix of the inputs is not finite")
        return cls(damped(gram, damping) if damping else gram.double())

    @classmethod
    def centred(cls, gram: torch.Tensor, mean: torch.Tensor, tokens: int) -> Metric:
        """Of inputs less their mean, (in,): a bias makes good what an approximation does to that."""
        mean = mean.double()
        return cls.of(gram.double() - tokens * torch.outer(mean, mean))

    @classmethod
    def plain(cls, features: int, device: torch.device | str = "cpu") -> Metric:
        """All directions of the input count alike: the error is that of the weights."""
        return cls(torch.eye(features, dtype=torch.float64, device=device))

    @classmethod
    def diagonal(cls, importance: torch.Tensor) -> Metric:
        """importance: (in,), by which the squared error of each input feature counts."""
        return cls(torch.diag(importance.double()))

    @staticmethod
    def workspace(shape: tuple[int, int]) -> int:
        """Bytes that the eigenvectors for a weight (out, in) take, and fitting factors to them."""
        out, width = shape
        least = 8 * min(shape) ** 2
        root = 8 * width**2 if out > width else 0
        return root + max(8 * out * width + 4 * least, 5 * 8 * out * width)

    @cached_property
    def root(self) -> torch.Tensor:
        """R, (in, in), with R Rᵀ = H."""
        values, vectors = torch.linalg.eigh(self.gram)
        return vectors * values.clamp(min=0).sqrt()

    def energies(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: (out, in) -> squared singular values of W R, (min(out, in),) float64, the largest first."""
        return torch.linalg.eigvalsh(self._smaller(weight.double())).flip(0).clamp(min=0)

    def basis(self, weight: torch.Tensor, rank: int) -> torch.Tensor:
        """The first `rank` left singular vectors of W R, (out, rank) float64, orthonormal."""
        weight = weight.double()
        vectors = torch.linalg.eigh(self._smaller(weight))[1].flip(1)[:, :rank]
        if len(weight) <= weight.shape[1]:
            return vectors
        return torch.linalg.qr(weight @ (self.root @ vectors))[0]

    def _smaller(self, weight: torch.Tensor) -> torch.Tensor:
        """W H Wᵀ or Rᵀ Wᵀ W R, whose eigenvalues other than zero are the same."""
        if len(weight) <= weight.shape[1]:
            product = weight @ self.gram @ weight.T
        else:
            product = self.root.T @ (weight.T @ weight) @ self.root
        return (product + product.T) / 2

    def loss(self, difference: torch.Tensor) -> float:
        """tr(D H Dᵀ) of D (out, in)."""
        difference = difference.double()
        return float(((difference @ self.gram) * difference).sum())

    def left_for(self, target: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        """The left factor (rows, rank) that is best for this right one (rank, in): W H Aᵀ (A H Aᵀ)⁻¹, float64; None
        where A H Aᵀ is too close to singular. target: (rows, in)."""
        right = right.double()
        seen = self.gram @ right.T
        inner = right @ seen
        factor, info = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        diagonal = factor.diagonal()
        if info or not len(diagonal) or float(diagonal.min() / diagonal.max()) < 1e-6:
            return None
        return torch.cholesky_solve(seen.T @ target.double().T, factor).T

    def inner(self, right: torch.Tensor) -> torch.Tensor:
        """A H Aᵀ: the Gram matrix of what a left factor sees, (rank, rank)."""
        return right.double() @ self.gram @ right.double().T
