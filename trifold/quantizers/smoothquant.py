"""SmoothQuant: divide the inputs of a layer by a scale for each channel, and multiply its weights by it.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438. The division goes into whatever produces the input, so that nothing is added at run time; what
activations lose in range, and rounding them in error, weights gain. A later step rounds both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import linear

from trifold.core.errors import RecipeError
from trifold.core.folding import divide_producer, foldable, rows_in_block
from trifold.core.inputs import InputScheme, round_input
from trifold.core.method import METHODS, BlockContext, BlockMethod, Rewrite
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import Scheme
from trifold.core.statistics import AbsMax, Sample, Statistic
from trifold.core.topology import Fold
from trifold.quantizers.rtn import round_to_nearest

_LEAST = 1e-5


def smoothing(absmax: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = absmax**alpha / weight_max**(1 - alpha), (in,), at least 1e-5; 1 where the input was never but zero.

    absmax: (in,), largest |x| of each channel. weight_max: (in,), largest |w| in each column.
    """
    scale = absmax.pow(alpha) / weight_max.clamp(min=_LEAST).pow(1 - alpha)
    return torch.where((absmax > 0) & torch.isfinite(scale), scale.clamp(min=_LEAST), torch.ones_like(scale))


@METHODS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(BlockMethod):
    """alpha: how much of the difficulty goes from activations to weights. "search" takes for each fold the one of
    `grid` + 1 values in 0..1, or none at all, with the least squared error of the layers' outputs, on a sample of
    their inputs, with activations and weights rounded as a later step will. folds: "all" that are known, or those
    into a "norm". The paper is alpha 0.5 and folds "norm".
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (AbsMax, Sample)

    alpha: float | Literal["search"] = "search"
    grid: int = 20
    folds: Literal["all", "norm"] = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha={self.alpha} is outside 0..1; 0.5 is the paper's, 'search' the default")
        if self.grid < 1:
            raise RecipeError(f"grid={self.grid}: at least 1 is needed; 20 is usual")

    def rewrite(self, context: BlockContext, carry: Any) -> tuple[Rewrite, Any]:
        weights, parameters = dict(context.weights), dict(context.parameters)
        divided: dict[str, torch.Tensor] = {}
        events: dict[str, dict[str, Any]] = {}
        for fold in context.topology.folds:
            rows = rows_in_block(fold, context) if fold.kind == "norm" or self.folds == "all" else None
            if rows is None:
                continue
            problem, norm = _Problem(fold, context, weights), parameters.get(f"{fold.producer}.weight")
            scale, found = self._choose(problem, partial(foldable, fold, rows, norm=norm))
            events.update({name: {"smoothquant": found} for name in fold.consumers})
            if found["alpha"] is None:
                continue
            changed_weights, changed_parameters = divide_producer(fold, rows, scale, weights, parameters)
            weights.update(changed_weights)
            parameters.update(changed_parameters)
            for name in fold.consumers:
                weights[name], divided[name] = weights[name] * scale, scale
        changed = _changed(weights, context.weights), _changed(parameters, context.parameters)
        return Rewrite(*changed, divided, events=events), carry

    def _choose(
        self, problem: _Problem, possible: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The scale and what the report says of it. possible: the nearest scale that the producer can take over."""
        tried = [(alpha, possible(scale)) for alpha, scale in self._candidates(problem)]
        if len(tried) == 1:
            return tried[0][1], {"alpha": tried[0][0]}
        losses = [problem.loss(scale) for _, scale in tried]
        alpha, scale = tried[losses.index(min(losses))]
        return scale, {"alpha": alpha, "loss_ratio": min(losses) / max(losses[0], 1e-30)}

    def _candidates(self, problem: _Problem) -> Iterator[tuple[float | None, torch.Tensor]]:
        """None and ones stand for: leave it."""
        if isinstance(self.alpha, str):
            yield None, torch.ones_like(problem.absmax, dtype=problem.dtype)
            alphas = [step / self.grid for step in range(self.grid + 1)]
        else:
            alphas = [self.alpha]
        for alpha in alphas:
            yield alpha, smoothing(problem.absmax, problem.weight_max, alpha).to(problem.dtype)


class _Problem:
    """One fold: the linears on its output, and the input that they share."""

    def __init__(self, fold: Fold, context: BlockContext, weights: Mapping[str, torch.Tensor]) -> None:
        statistics = context.statistics[context.inputs[fold.consumers[0]]]
        assert statistics.absmax is not None and statistics.sample is not None
        self.absmax, self.sample = statistics.absmax, statistics.sample
        self.dtype = weights[fold.consumers[0]].dtype
        self.weights = [weights[name].float() for name in fold.consumers]
        self.weight_max = torch.stack([weight.abs().amax(0) for weight in self.weights]).amax(0)
        self.schemes: list[Scheme] = [context.schemes[name] for name in fold.consumers]
        self.inputs: list[InputScheme | None] = [context.roundings.get(name) for name in fold.consumers]
        self.outputs = [linear(self.sample, weight) for weight in self.weights]

    def loss(self, scale: torch.Tensor) -> float:
        """Squared error of all outputs on the sample, with inputs / scale and weights * scale rounded."""
        scale = scale.float()
        total, divided = 0.0, self.sample / scale
        for weight, scheme, inputs, output in zip(self.weights, self.schemes, self.inputs, self.outputs, strict=True):
            x, scaled = divided, weight * scale
            if inputs is not None:
                x = round_input(x, inputs, inputs.static_scale(self.absmax / scale) if inputs.static else None)
            rounded = round_to_nearest(scaled, fit_ranges(scaled, scheme), scheme).dequantize()
            total += float((linear(x, rounded) - output).square().sum())
        return total


def _changed(new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in new.items() if tensor is not old[name]}
