"""Block methods at work on one block: what they are handed, and what they change."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trifold.compress.seen import Seen
from trifold.compress.slicing import slice_attention
from trifold.core.linears import set_weight, weight_of
from trifold.core.method import BlockContext, BlockMethod, Rewrite
from trifold.core.statistics import Gram
from trifold.core.topology import Topology
from trifold.formats import digest

if TYPE_CHECKING:
    from trifold.compress.block import BlockCompressor


def rewrite_block(compressor: BlockCompressor, topology: Topology, carries: dict[str, Any]) -> None:
    """Run the recipe's block methods. carries: what each passed on from the block before."""
    for step, method, allowed in compressor.plan.rewrites:
        again = True
        while again:
            context, leaders = context_of(compressor, method, allowed, topology)
            first = compressor.runner.processes.writes  # only its sample of inputs counts
            decided = method.rewrite(context, carries.get(step)) if first else None
            change, carries[step] = compressor.runner.processes.same(decided, device=compressor.runner.device)
            _apply(compressor, change, {leader: Seen.of(s) for leader, s in context.statistics.items()}, leaders)
            if method.cuts:
                _cut(compressor, change, topology)
            again = change.again
    _note_sizes(compressor)


def context_of(
    compressor: BlockCompressor, method: BlockMethod, allowed: Container[str], topology: Topology
) -> tuple[BlockContext, dict[str, str]]:
    """What a block method is handed, with the statistics that it needs, and the leader of each linear's stage."""
    chosen = [name for name in compressor.weights if compressor.prefix + name in allowed]
    statistics = compressor.gather(chosen, (Gram, *method.gathers))
    leaders = {name: stage[0] for stage in compressor.runner.stages for name in stage}
    plans = {
        name: compressor.plan.layers[compressor.prefix + name]
        for name in chosen
        if compressor.prefix + name in compressor.plan.layers
    }
    context = BlockContext(
        topology=topology,
        weights={name: compressor.weights[name].float() for name in chosen},
        parameters=_parameters(compressor),
        inputs={name: leaders[name] for name in chosen},
        statistics={leaders[name]: statistics[leaders[name]] for name in chosen},
        schemes={name: plan.scheme for name, plan in plans.items() if plan.scheme is not None},
        replay=partial(_replay, compressor),
        roundings={name: plan.input for name, plan in plans.items() if plan.input is not None},
    )
    return context, leaders


def _cut(compressor: BlockCompressor, change: Rewrite, topology: Topology) -> None:
    """Give the attention the heads that a method left, and find out anew how the block runs."""
    layout = topology.dimensions.attention
    if change.heads is not None and layout is not None:
        sliced = slice_attention(compressor.module, layout, change.heads)
        name, index = compressor.prefix + layout.module, sliced.rotary_index
        sizes = {"qk_dim": sliced.qk_dim, "v_dim": sliced.v_dim, "head_dim": layout.head_dim}
        compressor.done.slices[name] = sizes
        compressor.done.digests[name] = digest({} if index is None else {"rotary_index": index})
    compressor.widths = {name: weight_of(m).shape[1] for name, m in compressor.runner.linears.items()}
    compressor.runner = compressor.runner.anew(compressor.runner.linears)
    compressor.seen = {}


def _note_sizes(compressor: BlockCompressor) -> None:
    """Report the linears that a method may have cut, and go on with those that are solved."""
    cut = [names for _, method, names in compressor.plan.rewrites if method.cuts]
    for linear in [name for name in compressor.weights if any(compressor.prefix + name in names for names in cut)]:
        name, of, module = compressor.prefix + linear, compressor.shapes[linear], compressor.runner.linears[linear]
        compressor.done.slices[name] = {"shape": list(weight_of(module).shape), "of": list(of)}
        if name in compressor.plan.layers:
            continue
        stored = module.get_parameter("weight").data
        compressor.done.digests[name] = digest({"weight": stored})
        errors = [event["error"] for event in compressor.events.get(linear, {}).values() if "error" in event]
        compressor.done.report[name] = {
            "error": max(errors, default=0.0),
            "error_of": "output",
            "bits_per_weight": 8 * stored.nbytes / (of[0] * of[1]),
        }
        compressor.layer_done(name, compressor.done.report[name])
    solved = {
        name: module
        for name, module in compressor.runner.linears.items()
        if compressor.prefix + name in compressor.plan.layers
    }
    if len(solved) < len(compressor.runner.linears):
        compressor.weights = {name: compressor.weights[name] for name in solved}
        compressor.widths = {name: compressor.widths[name] for name in solved}
        compressor.runner = compressor.runner.anew(solved)


def _parameters(compressor: BlockCompressor) -> dict[str, torch.Tensor]:
    solved = {name + ".weight" for name in compressor.widths}
    return {name: p.data for name, p in compressor.module.named_parameters() if name not in solved}


@torch.no_grad()
def _replay(compressor: BlockCompressor, name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    before = {layer: weight_of(compressor.runner.linears[layer]).clone() for layer in weights}
    try:
        for layer, weight in weights.items():
            set_weight(compressor.runner.linears[layer], weight)
        submodule, outputs = compressor.module.get_submodule(name), []
        for args, kwargs in compressor.runner.sample(name):
            out = submodule(*args, **kwargs)
            outputs.append(out[0] if isinstance(out, tuple | list) else out)
    finally:
        for layer, weight in before.items():
            set_weight(compressor.runner.linears[layer], weight)
    return torch.cat([out.float().flatten(0, -2) for out in outputs])


def _apply(compressor: BlockCompressor, change: Rewrite, seen: dict[str, Seen], leaders: Mapping[str, str]) -> None:
    parameters = dict(compressor.module.named_parameters())
    for name, value in change.parameters.items():
        parameters[name].data = value.to(parameters[name].dtype)
    for name, weight in change.weights.items():
        compressor.weights[name] = weight
        set_weight(compressor.runner.linears[name], weight)
    for name, divisor in change.divided.items():
        if leaders[name] == name:
            seen[name] = seen[name].divided(divisor)
    compressor.seen = seen
    compressor.bounds.update(change.bounds)
    for name, event in change.events.items():
        compressor.events.setdefault(name, {}).update(event)
