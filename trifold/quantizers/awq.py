"""AWQ: scale up the input channels that matter before rounding, and fold the inverse into what comes before.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978. The output error of a candidate
is read off the Gram matrix of the layer's inputs, tr((W - Q) H (W - Q)ᵀ), instead of running the module once
per candidate; `objective="module"` is the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from trifold.core.errors import RecipeError
from trifold.core.folding import divide_producer, foldable, rows_in_block
from trifold.core.method import METHODS, BlockContext, BlockMethod, Bounds, Rewrite
from trifold.core.ranges import expand_groups, fit_ranges, from_bounds, group_view, to_codes
from trifold.core.scheme import Scheme
from trifold.core.statistics import AbsMean, Gram, Statistic
from trifold.core.topology import Fold

_CLIP_STEPS = 20
_EPSILON = 1e-4


@METHODS.register("awq")
@dataclass(frozen=True)
class AWQ(BlockMethod):
    """Scale search, then clip search; a later step rounds.

    scaling: "plain" tries s = a^r with a the mean |input| of each channel, "duo" s = a^r / w^(1-r) with w the
    mean relative weight, "both" the two. r runs over `grid` values in [0, 1); s = 1, plain rounding, is always
    tried. clip: search the ranges too. objective: "gram" or the paper's "module".
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram, AbsMean)

    scaling: Literal["plain", "duo", "both"] = "both"
    grid: int = 20
    clip: bool = True
    objective: Literal["gram", "module"] = "gram"

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise RecipeError(f"grid={self.grid}: at least 1 is needed; 20 is usual")

    def rewrite(self, context: BlockContext, carry: Any) -> tuple[Rewrite, Any]:
        work = _Work(context)
        for fold in context.topology.folds:
            rows = rows_in_block(fold, context)
            if rows is not None:
                self._scale(fold, rows, work)
        if self.clip:
            for name in work.schemes:
                work.bounds[name] = clip_search(work.weights[name], work.schemes[name], work.gram(name))
        return work.result(), carry

    def _scale(self, fold: Fold, rows: torch.Tensor, work: _Work) -> None:
        leader = work.context.inputs[fold.consumers[0]]
        activity = work.context.statistics[leader].absmean / work.divided_by(leader)
        weights = {name: work.weights[name] for name in fold.consumers}
        schemes = [work.schemes[name] for name in fold.consumers]
        relative = _relative_weight(list(weights.values()), schemes)
        norm = work.parameter(f"{fold.producer}.weight")
        best, best_loss, best_kind, plain = None, float("inf"), "none", float("inf")
        for kind, scale in self._candidates(activity, relative):
            scale = foldable(fold, rows, scale, norm)
            loss = self._loss(fold, weights, schemes, scale, work)
            plain = loss if kind == "none" else plain
            if loss < best_loss:
                best, best_loss, best_kind = scale, loss, kind
        if best is not None and best_kind != "none":
            work.apply(fold, rows, best)
        for name in fold.consumers:
            work.events[name] = {"awq": {"scaling": best_kind, "loss_ratio": best_loss / max(plain, 1e-30)}}

    def _candidates(self, activity: torch.Tensor, relative: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield "none", torch.ones_like(activity)
        for step in range(self.grid):
            r = step / self.grid
            if self.scaling in ("plain", "both") and step:
                yield f"plain {r:g}", _normalised(activity.pow(r))
            if self.scaling in ("duo", "both"):
                yield f"duo {r:g}", _normalised(activity.pow(r) / (relative.pow(1 - r) + _EPSILON))

    def _loss(
        self,
        fold: Fold,
        weights: Mapping[str, torch.Tensor],
        schemes: Sequence[Scheme],
        scale: torch.Tensor,
        work: _Work,
    ) -> float:
        rounded = {
            name: _rounded(weight * scale, scheme) / scale
            for (name, weight), scheme in zip(weights.items(), schemes, strict=True)
        }
        if self.objective == "module":
            return work.module_loss(fold, weights, rounded)
        gram = work.gram(fold.consumers[0])
        loss = 0.0
        for name, weight in weights.items():
            difference = rounded[name] - weight
            loss += float(((difference @ gram) * difference).sum())
        return loss


class _Work:
    """The block while folds are applied one after the other."""

    def __init__(self, context: BlockContext) -> None:
        self.context = context
        self.weights = dict(context.weights)
        self.schemes = context.schemes
        self.parameters: dict[str, torch.Tensor] = {}
        self.divided: dict[str, torch.Tensor] = {}
        self.bounds: dict[str, Bounds] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self._grams: dict[str, torch.Tensor] = {}
        self._dense_outputs: dict[str, torch.Tensor] = {}

    def divided_by(self, name: str) -> torch.Tensor:
        """What the input of this linear has been divided by so far."""
        statistics = self.context.statistics[self.context.inputs.get(name, name)]
        return self.divided.get(name, torch.ones(statistics.in_features, device=statistics.gram.device))

    def gram(self, name: str) -> torch.Tensor:
        """(in, in) float32, per token, of the input as it is now."""
        leader = self.context.inputs[name]
        if leader not in self._grams:
            statistics = self.context.statistics[leader]
            inverse = self.divided_by(leader).double().reciprocal()
            gram = statistics.gram * inverse * inverse[:, None] / max(statistics.tokens, 1)
            self._grams[leader] = gram.float()
        return self._grams[leader]

    def parameter(self, name: str) -> torch.Tensor | None:
        """A dense parameter of the block as it is now."""
        return self.parameters.get(name, self.context.parameters.get(name))

    def apply(self, fold: Fold, rows: torch.Tensor, scale: torch.Tensor) -> None:
        """Divide the producer's output by `scale` and multiply the consumers' columns by it."""
        known = {**self.context.parameters, **self.parameters}
        weights, parameters = divide_producer(fold, rows, scale, self.weights, known)
        self.weights.update(weights)
        self.parameters.update(parameters)
        for name in fold.consumers:
            self.weights[name] = self.weights[name] * scale
            self.divided[name] = self.divided_by(name) * scale
        self._grams.pop(self.context.inputs[fold.consumers[0]], None)

    def module_loss(
        self, fold: Fold, weights: Mapping[str, torch.Tensor], rounded: Mapping[str, torch.Tensor]
    ) -> float:
        """The paper's objective: mean squared change of the inspected module's output, on the first batch."""
        key = fold.inspect + "/" + fold.consumers[0]
        replay, base = self.context.replay, self.context.weights
        undone = {name: rounded[name] * self.divided_by(name).reciprocal() for name in weights}
        if key not in self._dense_outputs:
            self._dense_outputs[key] = replay(fold.inspect, {name: base[name] for name in weights})
        return float((replay(fold.inspect, undone) - self._dense_outputs[key]).square().mean())

    def result(self) -> Rewrite:
        changed = {n: w for n, w in self.weights.items() if w is not self.context.weights[n]}
        return Rewrite(changed, self.parameters, self.divided, self.bounds, self.events)


def _normalised(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clamp(min=_EPSILON)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


def _relative_weight(weights: Sequence[torch.Tensor], schemes: Sequence[Scheme]) -> torch.Tensor:
    """(in,): mean over all rows of |w| relative to its group's largest."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight, scheme in zip(weights, schemes, strict=True):
        width = scheme.group_width(weight.shape[1])
        largest = group_view(weight.abs(), width).amax(-1)
        total += (weight.abs() / (expand_groups(largest, weight.shape, width) + 1e-6)).sum(0)
    return total / sum(len(w) for w in weights)


def _rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    width = scheme.group_width(weight.shape[1])
    scale, zero = fit_ranges(weight, scheme)
    scale = expand_groups(scale, weight.shape, width)
    z = scheme.midpoint if zero is None else expand_groups(zero, weight.shape, width)
    return (to_codes(weight, scale, z, scheme) - z) * scale


def clip_search(weight: torch.Tensor, scheme: Scheme, gram: torch.Tensor) -> Bounds:
    """Per group, the range (down to half of the largest magnitude) with the least output error of that group.

    weight: (out, in) float32. gram: (in, in) float32; only its diagonal blocks count.
    """
    if scheme.group_size == "tensor":
        return fit_ranges(weight, scheme)
    width = scheme.group_width(weight.shape[1])
    short = -weight.shape[1] % width
    padded = torch.nn.functional.pad(gram, (0, short, 0, short))
    blocks = torch.stack([padded[i : i + width, i : i + width] for i in range(0, len(padded), width)])
    groups = group_view(weight, width)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    largest = torch.maximum(-low, high)
    best_scale, best_zero = from_bounds(low, high, scheme)
    best = torch.full_like(best_scale, torch.inf)
    for step in range(_CLIP_STEPS // 2):
        limit = largest * (1 - step / _CLIP_STEPS)
        scale, zero = from_bounds(torch.maximum(low, -limit), torch.minimum(high, limit), scheme)
        z = scheme.midpoint if zero is None else zero
        difference = (to_codes(groups, scale, z, scheme) - z) * scale - groups
        error = (torch.einsum("ngi,gij->ngj", difference, blocks) * difference).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.squeeze(-1), None if best_zero is None else best_zero.squeeze(-1)
