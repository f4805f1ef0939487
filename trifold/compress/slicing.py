"""Blocks with smaller dimensions: dividing the budget before the walk, cutting a block, cutting a skeleton at load.

The checkpoint's config says under `slices`, by full name, what has another size than the model's own config makes it:
of a linear `shape`, (out, in), and `of`, the size it had; of an attention `qk_dim`, `v_dim` and `head_dim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trifold.compress.capture import own_state
from trifold.compress.integration.sliced_attention import SlicedAttention
from trifold.compress.runner import BlockRunner
from trifold.core.dimensions import Attention, Dimensions, dimensions_of
from trifold.core.errors import CheckpointError, RecipeError
from trifold.core.linears import is_linear, linears, resize, weight_of
from trifold.core.method import BlockMethod, Heads

if TYPE_CHECKING:
    from trifold.compress.plan import Plan
    from trifold.compress.walk import Walk

Slices = dict[str, dict[str, Any]]

_SAME, _SAME_ROUNDED = 1e-4, 3e-2  # how far an attention may be from its own forward, in float32 and in 16 bits


def check_known(methods: Mapping[str, BlockMethod], dimensions: Dimensions, family: str) -> None:
    """Raise RecipeError if a step is to cut dimensions of a family of which none are known."""
    for step, method in methods.items():
        if method.cuts and dimensions == Dimensions():
            raise RecipeError(
                f"step {step!r}: it is not known which dimensions of {family} can be cut; "
                "leave the step out, or take factors instead (rank80)"
            )


def cuts(plan: Plan) -> bool:
    """Whether any step makes dimensions smaller."""
    return any(method.cuts for _, method, _ in plan.rewrites)


@torch.no_grad()
def survey(walk: Walk) -> dict[str, Any]:
    """Step -> the carry that enters the first block, of the methods that cut. One pass over the dense blocks; the
    walk's hidden states stay as they are. Raises RecipeError if a budget cannot be met."""
    from trifold.compress.block import BlockCompressor
    from trifold.compress.rewrite import context_of

    job, source = walk.job, walk.job.source
    methods = [entry for entry in job.plan.rewrites if entry[1].cuts]
    found: dict[str, list[Any]] = {step: [] for step, _, _ in methods}
    hidden, calls = walk.beside(walk.starts()), [own_state(c) for c in walk.calls]
    uncut: dict[str, list[str]] = {}
    for index in range(source.block_count if methods else 0):
        prefix = f"{source.blocks}.{index}."
        block = source.open_block(index)
        wanted = {name.removeprefix(prefix) for _, _, names in methods for name in names if name.startswith(prefix)}
        if any(c[index].skipped for c in calls):
            wanted = set()
        targets = {name: module for name, module in linears(block).items() if name in wanted}
        held = (walk.room.remembered, walk.release, job.processes)
        runner = BlockRunner(block, targets, [c[index] for c in calls], hidden, *held)
        compressor = BlockCompressor(block, prefix, job.plan, runner, job.observed, job.report.layer, walk.room)
        possible = _possible(block, job.topology.dimensions, runner, source.dtype) if wanted else (Dimensions(), [])
        dimensions, why = job.processes.same(possible)
        for reason in why:
            uncut.setdefault(reason, []).append(str(index))
        contexts = [
            context_of(compressor, method, names, replace(job.topology, dimensions=dimensions))[0]
            for _, method, names in methods
        ]
        after, alike, tokens = hidden[0], 0.0, 0
        for batch in reversed(range(len(hidden))):  # the first one's own inputs are wanted below
            before = hidden[batch].float()
            after = runner.calls[batch].run(block, hidden[batch])
            cosine = torch.cosine_similarity(before, after.float(), dim=-1)
            alike, tokens = alike + float(cosine.double().sum()), tokens + cosine.numel()
            if batch:
                hidden[batch].copy_(after)
        alike, seen = job.processes.total(alike, tokens)
        for (step, method, _), context in zip(methods, contexts, strict=True):
            known = method.survey(context, 1 - alike / seen) if job.processes.writes else None
            found[step].append(job.processes.same(known))
        hidden[0].copy_(after)
        source.close_block(index)
    walk.forget(hidden)
    for reason, blocks in uncut.items():
        which = "" if len(blocks) == source.block_count else f" (blocks {', '.join(blocks)})"
        job.report.notice(reason + which)
    return {step: method.begin(found[step]) for step, method, _ in methods}


def _possible(
    block: nn.Module, known: Dimensions, runner: BlockRunner, dtype: torch.dtype
) -> tuple[Dimensions, list[str]]:
    """The dimensions that this block really has, and a line for everything that stays whole."""
    attention, feed_forward, why = known.attention, known.feed_forward, []
    names = {name for name, _ in block.named_modules()}
    if feed_forward is not None and not {feed_forward.down, *feed_forward.inward} <= names:
        feed_forward = None
        why.append("there is no MLP of two layers or three, so its width stays")
    if attention is None:
        why.append("queries, keys and values are made in a way that heads cannot be cut in, so attention stays whole")
    elif attention.module not in names or not _stands_for(block, attention, runner, dtype):
        attention = None
        why.append("attention is not what its family's usually is, so it stays whole")
    elif attention.norms:
        why.append("queries and keys have a norm over their whole head, so they keep its size; values are cut")
    return Dimensions(attention, feed_forward), why


@torch.no_grad()
def _stands_for(block: nn.Module, layout: Attention, runner: BlockRunner, dtype: torch.dtype) -> bool:
    """Whether a `SlicedAttention` with whole heads gives what the block's own does, on the first batch."""
    own = block.get_submodule(layout.module)
    limit = _SAME if dtype == torch.float32 else _SAME_ROUNDED
    try:
        whole = SlicedAttention(own, layout, layout.head_dim, layout.head_dim)
        for args, kwargs in runner.sample(layout.module):
            wanted, found = own(*args, **kwargs)[0].double(), whole(*args, **kwargs)[0].double()
            if not float((found - wanted).norm()) <= limit * float(wanted.norm()):
                return False
    except (AttributeError, TypeError, RuntimeError, IndexError, KeyError, AssertionError):
        return False
    return True


def slice_attention(parent: nn.Module, layout: Attention, heads: Heads, prefix: str = "") -> SlicedAttention:
    """Put a sliced attention in the place of the one below `parent`; its linears are to be of the new sizes."""
    name = prefix + layout.module
    sliced = SlicedAttention(parent.get_submodule(name), layout, heads.qk_dim, heads.v_dim)
    if sliced.rotary_index is not None and heads.frequencies is not None:
        device = weight_of(sliced.get_submodule(layout.o)).device
        sliced.rotary_index = heads.frequencies.to(device=device, dtype=torch.int16)
    parent.set_submodule(name, sliced)
    return sliced


def slice_modules(model: Any, slices: Slices) -> None:
    """Give an empty model the dimensions that a checkpoint's config says. Raises CheckpointError if they do not fit."""
    if not slices:
        return
    layout = dimensions_of(model.config.get_text_config()).attention
    for name, entry in slices.items():
        try:
            module = model.get_submodule(name)
            if "shape" in entry:
                rows, columns = (int(size) for size in entry["shape"])
                if not is_linear(module) or list(weight_of(module).shape) != list(entry["of"]):
                    raise CheckpointError(f"config.json: {name} is not a linear layer of shape {entry['of']}")
                resize(module, rows, columns)
                continue
            heads = Heads(int(entry["qk_dim"]), int(entry["v_dim"]))
        except AttributeError as error:
            raise CheckpointError(f"config.json: no layer {name!r} in {type(model).__name__}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: the entry of {name} in `slices` is damaged ({error!r})") from error
        if layout is None or not name.endswith(layout.module) or layout.head_dim != entry.get("head_dim"):
            raise CheckpointError(f"config.json: {name} is no attention with heads of {entry.get('head_dim')} features")
        device = weight_of(module.get_submodule(layout.o)).device
        with torch.device(device):
            slice_attention(model, layout, heads, name.removesuffix(layout.module))
