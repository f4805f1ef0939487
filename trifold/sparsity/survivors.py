"""What pruners do alike: the metric they share, better values for the weights that stay, and rounding those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from trifold.core.canonical import Dense, Sparse
from trifold.core.columns import NearestCode
from trifold.core.method import LayerProblem
from trifold.core.obs import Damping, damped, inverse_cholesky, sweep
from trifold.core.pattern import Pattern
from trifold.core.ranges import Ranges, expand_groups, fit_ranges, to_codes
from trifold.core.refine import refine
from trifold.core.rounding import quantized
from trifold.core.scheme import SCALE_DTYPES, Scheme

StoredDtype = Literal["bfloat16", "float16", "float32"]

_NORM, _STEPS = 4.0, 20  # of the search for ranges that refinement follows, as in GPTQ


@dataclass(frozen=True)
class Metric:
    """How a layer's inputs weigh errors. hessian: H damped, (in, in) float64. upper: U with UᵀU = H⁻¹, float32, in
    the order of the features. dead: (in,) bool, never different from zero in calibration."""

    hessian: torch.Tensor
    upper: torch.Tensor
    dead: torch.Tensor
    damping: Damping

    @cached_property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (in,) and eigenvectors (in, in), float32, of H in units in which its diagonal is 1."""
        scale = self.hessian.diagonal().rsqrt()
        values, vectors = torch.linalg.eigh(self.hessian * scale * scale[:, None])
        return values.clamp(min=0.0).float(), vectors.float()

    @classmethod
    def of(cls, gram: torch.Tensor, ratio: float) -> Metric:
        """gram: (in, in) float64. Raises NotFiniteError if it holds NaN or infinity."""
        upper, damping = inverse_cholesky(gram, ratio)
        hessian = damped(gram, damping.ratio)
        if damping.diagonal:
            hessian = torch.diag(hessian.diagonal())
        return cls(hessian, upper.float(), gram.diagonal() <= 0, damping)


def sparse(values: torch.Tensor, mask: torch.Tensor, pattern: Pattern, dtype: StoredDtype) -> Sparse:
    """values (out, in) as they are stored, at the places of the mask."""
    stored = values.masked_fill(~mask, 0.0).to(SCALE_DTYPES[dtype])
    return Sparse(Dense(stored), mask, pattern.text)


def round_survivors(
    values: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    pattern: Pattern,
    scheme: Scheme,
    metric: Metric | None,
    ranges: Ranges = "mse",
    rounds: int = 2,
) -> Sparse:
    """GPTQ on the weights that stay: ranges of them alone, a sweep with the mask fixed, then refined codes and scales.

    values: (out, in), what is rounded, zero outside the mask. target: (out, in), what the loss compares with.
    Without a metric they are rounded to nearest.
    """
    scale, zero = fit_ranges(values, scheme, ranges, norm=_NORM, steps=_STEPS)
    origin = torch.full_like(scale, scheme.midpoint) if zero is None else zero
    if metric is None:
        width = scheme.group_width(values.shape[1])
        each, offset = (expand_groups(b, values.shape, width) for b in (scale, origin))
        codes = to_codes(values, each, offset, scheme)
    else:
        codes, scale = _swept(values, target, mask, scale, origin, scheme, metric, rounds)
    return masked(codes, scale, zero, mask, pattern, scheme)


def _swept(
    values: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    scheme: Scheme,
    metric: Metric,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) and scales, float32."""
    whole = scheme.group_size == "tensor"
    each, origin = (b.expand(len(values), 1) if whole else b for b in (scale, zero))
    width = scheme.group_width(values.shape[1])
    group = [j // width for j in range(values.shape[1])]
    grid = NearestCode(each.T, origin.T, group, scheme, mask.T.float().contiguous())
    sweep(values, metric.upper, grid)
    codes = grid.codes.T.contiguous()
    if rounds and not whole:
        hessian = (metric.hessian / metric.hessian.diagonal().mean()).float()
        codes, scale = refine(target, hessian, codes, scale, zero, scheme, rounds, mask=mask)
    return codes, scale


def masked(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    mask: torch.Tensor,
    pattern: Pattern,
    scheme: Scheme,
) -> Sparse:
    """Codes as `to_codes` gives them, with their ranges -> Sparse, in the one form in which it is stored."""
    values = quantized(codes, (scale, zero), scheme)
    return Sparse(values, mask, pattern.text).normalized()


def zeros(canonical: Sparse) -> float:
    """The share of the weights that are dropped."""
    return 1 - float(canonical.mask.double().mean())


def events(problem: LayerProblem, decided: Mapping[str, Sparse], metric: Metric | None) -> dict[str, dict[str, Any]]:
    """For the report: how sparse each layer is, and what its Gram matrix took."""
    damping = {"damping": asdict(metric.damping)} if metric is not None and metric.damping.remarkable else {}
    return {name: {"sparsity": zeros(decided[name]), **damping} for name in problem.weights}
