"""Type III: fewer features of values, by singular value decomposition of value and output projection together.

A value head v is read by the output blocks of all query heads that share it, so the best r features of it are those
of R [W_O,1 ... W_O,g], RᵀR = Σ v vᵀ: a product as small as a head, whatever the width of the model (the same optimum
as from the root of the Gram matrix of the attention's inputs). Lin et al. 2024, MoDeGPT, arXiv 2408.09632, in which
heads are not shared; the code that is around for grouped queries looks at the values alone.
"""

from __future__ import annotations

import torch

from trifold.lowrank.modegpt.nystrom import factor
from trifold.lowrank.modegpt.pairs import square_root

_SMALLEST = 1e-9  # relative to the largest eigenvalue of a Gram matrix


def value_bases(
    grams: torch.Tensor, output: torch.Tensor | None, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """T and S, (kv heads, d, keep) each, with v ≈ S Tᵀ v, and the squared singular values, (kv heads, d).

    grams: (kv heads, d, d), Σ v vᵀ. output: (out, heads * d), the output projection; without it values are
    approximated for themselves. The values to keep are Tᵀ v, and W_O S reads them. The squared error over all tokens
    and output blocks of a group is the sum of the singular values from `keep` on.
    """
    root = square_root(grams)
    seen = root
    if output is not None:
        blocks = output.double().T.reshape(len(grams), -1, grams.shape[1], len(output))  # kv head, query head, d, out
        product = blocks @ blocks.mT
        seen = root @ square_root(product.sum(1))  # the same left singular vectors and values as with all of it
    u, s, _ = torch.linalg.svd(seen)
    values, vectors = torch.linalg.eigh(grams)
    inverse = torch.where(values > _SMALLEST * values[:, -1:], values, torch.inf).rsqrt()
    back = vectors * inverse[:, None, :] @ vectors.mT
    return back @ u[:, :, :keep], root @ u[:, :, :keep], s.square()


def narrowed(output: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """(out, heads * keep): what reads the kept values, W_O S for each query head. bases: (kv heads, d, keep)."""
    kv_heads, d, _ = bases.shape
    blocks = output.double().reshape(len(output), kv_heads, -1, d)
    return (blocks @ bases).reshape(len(output), -1)


def widened(narrow: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(out, heads * d): the output projection that on all values does the same as `narrow` on Tᵀ v.

    narrow: (out, heads * keep). maps: T, (kv heads, d, keep).
    """
    kv_heads, _, keep = maps.shape
    blocks = narrow.reshape(len(narrow), kv_heads, -1, keep)
    return (blocks @ maps.mT).reshape(len(narrow), -1)


def refit_output(
    gram: torch.Tensor, output: torch.Tensor, maps: torch.Tensor, bases: torch.Tensor, damping: float = 0.0
) -> torch.Tensor:
    """(out, heads * keep): the best reader of Tᵀ o on the heads' outputs o themselves, all heads together.

    gram: (heads * d, heads * d), Σ o oᵀ of the output projection's inputs. output: (out, heads * d). maps, bases: T
    and S, (kv heads, d, keep). damping: a ridge on how far it is from W_O S, as a multiple of the mean of the diagonal.
    """
    kv_heads, d, _ = maps.shape
    spread = torch.block_diag(*maps.repeat_interleave(output.shape[1] // (kv_heads * d), 0))
    first = narrowed(output, bases)
    crossed = gram.double() @ spread
    missing = (output.double() - widened(first, maps)) @ crossed
    return first + torch.cholesky_solve(missing.T, factor(spread.T @ crossed, damping)).T


def output_error(gram: torch.Tensor, output: torch.Tensor, wide: torch.Tensor) -> float:
    """tr((W - W') C (W - W')ᵀ), W' as wide as W."""
    change = output.double() - wide
    return float(((change @ gram.double()) * change).sum().clamp(min=0.0))
