"""GPTQ: round column by column, and let the later columns absorb the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. Then, beyond the paper, scales and codes are refined on the same loss.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from trifold.core.canonical import Quantized
from trifold.core.method import METHODS, Bounds, LayerMethod, LayerProblem, LayerSolution
from trifold.core.obs import Damping, damped, inverse_cholesky, sweep
from trifold.core.ranges import Ranges, expand_groups, fit_ranges, to_codes
from trifold.core.refine import refine
from trifold.core.scheme import Scheme
from trifold.core.statistics import Gram, Statistic
from trifold.quantizers.rtn import quantized


@METHODS.register("gptq")
@dataclass(frozen=True)
class GPTQ(LayerMethod):
    """The paper's loop with static groups.

    act_order: columns in order of falling diag(H), scales still by original position ("static groups"), so
    the stored layout is the ordinary one. damping: multiple of mean(diag H) added to the diagonal; it grows by
    itself while H is singular. ranges: how scales are found, from the dense weights, before the sweep.
    norm: exponent of the range search; 2.4 in the authors' code, 3 is better once scales are refitted.
    refine: rounds of exact scale refit and coordinate descent after the sweep; 0 is the paper.
    block_size: lazily updated columns; speed only.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    act_order: bool = True
    damping: float = 0.01
    ranges: Ranges = "mse"
    norm: float = 3.0
    refine: int = 4
    block_size: int = 128

    def solve(self, problem: LayerProblem) -> LayerSolution:
        assert problem.gram is not None
        order = self._order(problem.gram)
        upper, damping = inverse_cholesky(problem.gram[order][:, order], self.damping)
        canonical = {}
        for scheme, names in _by_scheme(problem).items():
            weights = [problem.weights[n] for n in names]
            bounds = [
                problem.bounds.get(n) or fit_ranges(w, scheme, self.ranges, norm=self.norm)
                for n, w in zip(names, weights, strict=True)
            ]
            codes = self._codes(weights, bounds, scheme, order, upper)
            for name, weight, code, bound in zip(names, weights, codes, bounds, strict=True):
                canonical[name] = self._refined(weight, problem.gram, code, bound, scheme, damping.ratio)
        return LayerSolution(canonical, _events(problem, damping))

    def _order(self, gram: torch.Tensor) -> torch.Tensor:
        if self.act_order:
            return torch.argsort(gram.diagonal(), descending=True, stable=True)
        return torch.arange(len(gram), device=gram.device)

    def _codes(
        self,
        weights: list[torch.Tensor],
        bounds: list[Bounds],
        scheme: Scheme,
        order: torch.Tensor,
        upper: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Codes of several weights that share their input, in one sweep over stacked rows."""
        rows, columns = [len(w) for w in weights], weights[0].shape[1]
        width = scheme.group_width(columns)

        def by_column(pick: int) -> torch.Tensor:
            wide = [expand_groups(b[pick], r, columns, width) for b, r in zip(bounds, rows, strict=True)]  # type: ignore[arg-type]
            return torch.cat(wide)[:, order].T.contiguous()

        scale = by_column(0)
        zero = torch.full_like(scale, scheme.midpoint) if scheme.symmetric else by_column(1)
        codes = torch.empty_like(scale)

        def decide(j: int, column: torch.Tensor) -> torch.Tensor:
            codes[j] = to_codes(column, scale[j], zero[j], scheme)
            return (codes[j] - zero[j]) * scale[j]

        sweep(torch.cat(weights)[:, order], upper.to(scale.dtype), decide, self.block_size)
        restored = torch.empty_like(codes)
        restored[order] = codes
        return list(restored.T.contiguous().split(rows))

    def _refined(
        self,
        weight: torch.Tensor,
        gram: torch.Tensor,
        codes: torch.Tensor,
        bounds: Bounds,
        scheme: Scheme,
        damping: float,
    ) -> Quantized:
        scale, zero = bounds
        if self.refine and scheme.group_size != "tensor":
            hessian = damped(gram, damping)
            hessian = (hessian / hessian.diagonal().mean()).to(weight.dtype)
            offset = torch.full_like(scale, scheme.midpoint) if zero is None else zero
            codes, scale = refine(weight, hessian, codes, scale, offset, scheme, self.refine)
        return quantized(codes, (scale, zero), scheme)


def _by_scheme(problem: LayerProblem) -> dict[Scheme, list[str]]:
    groups: dict[Scheme, list[str]] = defaultdict(list)
    for name in problem.weights:
        groups[problem.schemes[name]].append(name)
    return groups


def _events(problem: LayerProblem, damping: Damping) -> dict[str, dict[str, object]]:
    return {name: {"damping": asdict(damping)} for name in problem.weights} if damping.remarkable else {}
