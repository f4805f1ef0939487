"""How long a compression will take: a layer of random weights is really solved, and the others are scaled from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from trifold.compress.forecast import Text
from trifold.compress.plan import LayerPlan, Plan
from trifold.core.method import LayerMethod, LayerProblem, Statistics
from trifold.core.obs import relative_error
from trifold.core.statistics import Gram, Observation
from trifold.formats import pack

_TOKENS = 512  # of the synthetic text
_FORWARDS = 2.0  # passes over a block: one in stages, and one behind it


def measured(model: Any, plan: Plan, text: Text) -> dict[str, float]:
    """Seconds of the blocks' passes, of the statistics and of solving, on this machine's CPU. Rewriting and tuning are
    not among them.

    The largest layer of each method is solved once; products with a Gram matrix cost out x in x in, the rest
    out x in.
    """
    generator = torch.Generator().manual_seed(0)
    seconds = {"forward": 0.0, "statistics": 0.0, "solve": 0.0}
    tokens = text.tokens
    by_method: dict[LayerMethod, list[LayerPlan]] = {}
    for layer in plan.layers.values():
        by_method.setdefault(layer.method, []).append(layer)
    for method, layers in by_method.items():
        largest = max(layers, key=lambda layer: (math.prod(layer.shape), layer.shape[1]))
        rows, width = largest.shape
        x = torch.randn(_TOKENS, width, generator=generator)
        weight = torch.randn(rows, width, generator=generator) * 0.02
        forward = _seconds(_multiply, x.to(model.dtype), weight.to(model.dtype)) / (_TOKENS * rows * width)
        seconds["forward"] += _FORWARDS * tokens * forward * sum(math.prod(p.shape) for p in layers)
        problem = LayerProblem({"": weight}, {} if largest.scheme is None else {"": largest.scheme})
        if text.observed and method.gathers:
            statistics = Statistics(list(dict.fromkeys((Gram, *method.gathers))), width)
            gathering = _seconds(_gather, statistics, Observation(x, x))
            inputs = {(name.rpartition(".")[0], p.shape[1]) for name, p in plan.layers.items() if p.method == method}
            seconds["statistics"] += tokens / _TOKENS * gathering * sum(w**2 for _, w in inputs) / width**2
            problem = replace(problem, gram=statistics.gram, drift=statistics.drift, sample=statistics.sample)
        power = 2 if method.gathers else 1
        cost = sum(p.shape[0] * p.shape[1] ** power for p in layers) / (rows * width**power)
        seconds["solve"] += _seconds(_solve, method, problem) * cost
    return {**seconds, "total": sum(seconds.values())}


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> None:
    x @ weight.T


def _gather(statistics: Statistics, observation: Observation) -> None:
    for statistic in statistics:
        statistic.update(observation)


def _solve(method: LayerMethod, problem: LayerProblem) -> None:
    canonical = method.solve(problem).canonical[""]
    relative_error(problem.weights[""], canonical.dequantize(), problem.gram)
    pack(canonical)


def _seconds(action: Callable[..., None], *arguments: Any) -> float:
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started
