"""A first pass over the dense blocks that divides what the layers of a step give up together.

Each layer's inputs are those of the dense model. Its curve is the relative output error at several shares around the
wanted one, of a draft of the method; relative errors of all layers count alike, whatever their size, or by how much of
them reaches the hidden states behind the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from trifold.compress.capture import own_state
from trifold.compress.plan import LayerPlan, Plan
from trifold.compress.runner import BlockRunner
from trifold.compress.sensitivity import sensitivities
from trifold.compress.walk import Walk
from trifold.core.allocation import Option, allocate
from trifold.core.linears import linears, weight_of
from trifold.core.method import LayerProblem, Statistics
from trifold.core.obs import relative_error
from trifold.core.statistics import Gram
from trifold.kernels import unstack
from trifold.sparsity.owl import outlier_share, owl

_SPREAD, _MOST = 0.2, 0.95  # how far curves reach to both sides, and the largest share that is tried
_POINTS = 9


def has_budget(plan: Plan) -> bool:
    """Whether layers share something that has to be divided first."""
    return any(layer.method.budget for layer in plan.layers.values())


def with_shares(plan: Plan, shares: Mapping[str, float]) -> Plan:
    """The plan with each of these layers at its share."""
    layers = {
        name: replace(layer, method=layer.method.at(shares[name])) if name in shares else layer
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


def allocate_shares(walk: Walk) -> dict[str, float]:
    """Layer -> the share that it gives up, of all layers with a budget. The walk's hidden states stay as they are."""
    plan = walk.job.plan
    chosen = {name: layer for name, layer in plan.layers.items() if layer.method.budget}
    curves: dict[str, list[Option]] = {}
    outliers: dict[tuple[str, str], float] = {}
    if any(layer.method.budget.by != "uniform" for layer in chosen.values() if layer.method.budget):
        for prefix, weights, grams, sensitivity in _dense_blocks(walk, chosen):
            scores: dict[str, list[torch.Tensor]] = {}
            for name, weight in weights.items():
                layer = chosen[prefix + name]
                if layer.method.budget is not None and layer.method.budget.by == "curves":
                    curve = _curve(layer, weight, grams[name])
                    curves[prefix + name] = [replace(o, loss=o.loss * sensitivity.get(name, 1.0)) for o in curve]
                else:
                    scores.setdefault(layer.step, []).append(weight.abs() * grams[name].diagonal().sqrt().float())
            outliers.update({(step, prefix): outlier_share(found) for step, found in scores.items()})
    shares: dict[str, float] = {}
    for step in dict.fromkeys(layer.step for layer in chosen.values()):
        shares.update(_divide(step, {n: p for n, p in chosen.items() if p.step == step}, curves, outliers))
    return shares


def _divide(
    step: str,
    layers: Mapping[str, LayerPlan],
    curves: Mapping[str, list[Option]],
    outliers: Mapping[tuple[str, str], float],
) -> dict[str, float]:
    """The shares of one step's layers. What was not observed gets the mean."""
    budget = next(iter(layers.values())).method.budget
    assert budget is not None
    shares = dict.fromkeys(layers, budget.share)
    if budget.by == "curves":
        measured = {name: curves[name] for name in layers if name in curves}
        kept = budget.cost
        if kept is None:
            whole = (layers[name].method.full_cost(layers[name].shape, layers[name].scheme) for name in measured)
            kept = (1 - budget.share) * sum(whole)
        return shares | allocate(measured, kept)
    prefixes = [prefix for owner, prefix in outliers if owner == step]
    if budget.by == "owl" and prefixes:
        by_block = dict(zip(prefixes, owl([outliers[step, p] for p in prefixes], budget.share), strict=True))
        for name in shares:
            own = next((p for p in prefixes if name.startswith(p)), None)
            shares[name] = min(max(by_block[own], 0.0), _MOST) if own is not None else budget.share
    return shares


def _curve(layer: LayerPlan, weight: torch.Tensor, gram: torch.Tensor) -> list[Option]:
    budget, known = layer.method.budget, layer.method.curve(weight, layer.scheme, gram)
    if known is not None:
        return known
    assert budget is not None
    low, high = max(budget.share - _SPREAD, 0.0), min(budget.share + _SPREAD, _MOST)
    options = []
    for point in range(_POINTS):
        share = low + (high - low) * point / (_POINTS - 1)
        schemes = {} if layer.scheme is None else {"": layer.scheme}
        solved = layer.method.at(share, draft=True).solve(LayerProblem({"": weight}, schemes, gram)).canonical[""]
        options.append(Option(share, (1 - share) * weight.numel(), relative_error(weight, solved.dequantize(), gram)))
    return options


def _dense_blocks(
    walk: Walk, chosen: Mapping[str, LayerPlan]
) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]]:
    """Prefix, weights, Gram matrices and, where they are wanted, sensitivities of the chosen layers of each block, on
    the dense model's hidden states."""
    source = walk.job.source
    hidden, calls = walk.beside(walk.starts()), [own_state(c) for c in walk.calls]
    held = (walk.room.remembered, walk.release, walk.job.processes)
    for index in range(source.block_count):
        prefix = f"{source.blocks}.{index}."
        block = source.open_block(index)
        wanted = {name.removeprefix(prefix) for name in chosen if name.startswith(prefix)}
        unstack(block, wanted)
        targets = {n: m for n, m in linears(block).items() if n in wanted}
        runner = BlockRunner(block, targets, [c[index] for c in calls], hidden, *held)
        statistics = {
            stage[0]: Statistics((Gram,), weight_of(targets[stage[0]]).shape[1], source.device)
            for stage in runner.stages
        }
        if statistics:
            runner.observe(statistics)
        leaders = {name: stage[0] for stage in runner.stages for name in stage}
        weights = {name: weight_of(targets[name]).float() for name in leaders}
        grams = {name: statistics[leader].gram for name, leader in leaders.items()}
        budgets = {name: chosen[prefix + name].method.budget for name in leaders}
        tried = {name: targets[name] for name, budget in budgets.items() if budget is not None and budget.sensitive}
        sensitivity = sensitivities(block, tried, calls[0][index], hidden[0], grams) if tried else {}
        yield prefix, weights, grams, sensitivity
        hidden = runner.advance()
        source.close_block(index)
    walk.forget(hidden)
