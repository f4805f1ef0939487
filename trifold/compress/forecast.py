"""How much memory, disk and time a compression will take, before any weight is read.

Memory is the resident set of the process above what importing trifold, transformers and datasets takes, as the
operating system counts it. Every figure follows from the shapes of the model, the recipe and the text; the few
constants below were measured.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trifold.compress.memory import Room, free_bytes
from trifold.compress.plan import LayerPlan, Plan
from trifold.core.errors import ResourceError
from trifold.core.linears import is_transposed
from trifold.core.statistics import AbsMax, Gram, Statistic
from trifold.formats import Spec, stored_bytes

RUNTIME = 175_000_000  # what is imported when it is used: tokenizer, the model's code, libraries of matrix products
HEAP = 110_000_000  # what the allocator keeps between two stages
_SETTLED = 5  # float32 copies of a layer while its error is measured and it is packed
_CERTAIN = 0.85  # of a forecast is needed for certain
_WAYS_OUT: dict[str, dict[str, Any]] = {
    "--stats-memory 1MB": {"stats_memory": 10**6},
    "--offload-activations": {"offload_activations": True},
    "--offload-activations and --stats-memory 1MB": {"offload_activations": True, "stats_memory": 10**6},
}
_SHARDS = 2  # copies of a block while it is read: pages of the file, and the weights


@dataclass(frozen=True)
class Text:
    """Windows of a calibration: how many, their tokens, and those of one forward pass."""

    windows: int
    seqlen: int
    batch: int
    observed: bool = True

    @property
    def tokens(self) -> int:
        return self.windows * self.seqlen


@dataclass(frozen=True)
class Forecast:
    """memory: stage -> bytes of the host's memory at its peak. device: the same of a GPU; empty without one.
    disk: stage -> bytes beside OUT that are taken at once; `output` is what stays."""

    memory: dict[str, int]
    device: dict[str, int]
    disk: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the host's memory."""
        return max(self.memory.values())


@dataclass(frozen=True)
class _Block:
    """dense, packed: bytes. stages: layers that share an input, by their plans, with the dtype of their statistics.
    cut: (out, in) of the linears whose dimensions become smaller."""

    dense: int
    packed: int
    stages: tuple[tuple[LayerPlan, ...], ...]
    cut: tuple[tuple[int, int], ...] = ()

    def widest(self) -> int:
        solved = [plan.shape[1] for stage in self.stages for plan in stage]
        return max((*solved, *(width for _, width in self.cut)), default=0)


def forecast(
    model: Any, plan: Plan, specs: Mapping[str, Spec], blocks: str, text: Text, room: Room, gpu: bool = False
) -> Forecast:
    """Of a model on the meta device, and the specs its layers will have; those of which none is known stay as large as
    they are."""
    item, config = model.dtype.itemsize, model.config.get_text_config()
    hidden_size = config.hidden_size
    streams = 2 if plan.follows_dense else 1
    hidden = streams * text.tokens * hidden_size * item
    head_dim = _number(config, "head_dim") or hidden_size // (_number(config, "num_attention_heads") or 1)
    calls = 2 * text.tokens * head_dim * item
    parts, (_, packed_outside, ends) = _sizes(model, plan, specs, blocks)
    logits = _logits(config, text, item)
    live = 0 if room.offload else hidden
    kept = calls + (text.batch * hidden_size * item * streams if room.offload else hidden)
    remembered = 0 if room.offload else int(min(live, free_bytes() / 4))
    forward = 4 * text.batch * (4 * max((b.widest() for b in parts), default=0) + 6 * hidden_size)
    copies = streams  # of a block, where the dense one stands beside it
    stages = {
        "load": max(b.dense for b in parts) * _SHARDS + kept,
        "capture": ends + kept + forward,
        "observe": max(_observe(b, plan, room, text, copies) for b in parts) + kept + remembered + forward,
        "solve": max(_solve(b, text, copies) for b in parts) + kept + remembered + HEAP,
        "pack": max(b.dense * copies + b.packed for b in parts) + kept + forward,
        "tail": ends + packed_outside + kept + logits + _tail(model, plan, blocks, text),
        "proof": packed_outside + max(b.packed + b.dense for b in parts) + 3 * logits + HEAP,
    }
    if plan.rewrites and text.observed:
        again = hidden // streams if any(method.cuts for _, method, _ in plan.rewrites) and not room.offload else 0
        stages["rewrite"] = max(_rewrite(b, plan, room, forward) for b in parts) + kept + again + HEAP
    if any(layer.method.budget for layer in plan.layers.values()):
        beside = hidden // streams
        stages["allocate"] = max(_allocate(b, forward) for b in parts) + kept + (0 if room.offload else beside) + HEAP
    if plan.tuners:
        more = max(tuner.more_text for _, tuner, _ in plan.tuners)
        stages["tune"] = max(_tune(plan, parts)) + packed_outside + kept + more * (hidden + calls) + logits * 2
    device = {}
    if gpu:  # what calibration touches is there; the host reads shards and writes them
        device = {name: stages[name] for name in ("capture", "observe", "solve", "pack", "tail", "proof")}
        stages["load"] = max(b.dense for b in parts) * _SHARDS
        for name in device:
            stages[name] = max(b.packed for b in parts) * 2 + (hidden if room.offload else 0)
    stages = {name: RUNTIME + size for name, size in stages.items()}
    output = sum(b.packed for b in parts) + packed_outside
    journal = output - packed_outside + hidden + len(parts) * min(text.batch, text.tokens) * hidden_size * item
    spilled = hidden if room.offload else 0
    return Forecast(stages, device, {"journal": journal + hidden + spilled, "output": output})


def _number(config: Any, name: str) -> int | None:
    """A field of a config; None where there is none, or where it differs from layer to layer."""
    try:
        found = getattr(config, name, None)
    except Exception:  # transformers refuses what is not alike in all layers, with errors of its own
        return None
    return found if isinstance(found, int) else None


def check_memory(name: str, needed: Callable[..., Forecast], available: int | None) -> None:
    """Raise ResourceError if a compression cannot fit, naming the settings that would make it.

    needed: the forecast with these options changed.
    """
    if available is None or needed().peak * _CERTAIN <= available:
        return
    stage, peak = max(needed().memory.items(), key=lambda item: item[1])
    problem = f"{name}: needs about {_gb(peak)} of memory (stage {stage}), and {_gb(available)} are free"
    for words, changes in _WAYS_OUT.items():
        less = needed(**changes).peak
        if less * _CERTAIN <= available:
            raise ResourceError(f"{problem}; with {words} it needs {_gb(less)}")
    least = needed(**changes).peak
    raise ResourceError(f"{problem}; with {words} it still needs {_gb(least)}: use a machine with more, or less text")


def check_disk(name: str, needed: Forecast, output: Path) -> None:
    """Raise ResourceError if journal and result do not fit on the disk of `output`, what is there of them counted."""
    place = next(p for p in output.absolute().parents if p.exists())
    partial = output.with_name(output.name + ".partial")
    ours = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()) if partial.is_dir() else 0
    free, wanted = shutil.disk_usage(place).free + ours, sum(needed.disk.values())
    if wanted * _CERTAIN > free:
        raise ResourceError(
            f"{output}: {name} needs about {_gb(wanted)} of disk there, and {_gb(free)} are free; make room, or give "
            "a folder on another disk"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _sizes(model: Any, plan: Plan, specs: Mapping[str, Spec], blocks: str) -> tuple[list[_Block], tuple[int, int, int]]:
    """Of each block; and of what is outside of them: dense bytes, packed bytes, those of the largest tensor.

    Experts need not be taken apart: the difference that packing makes is that of their layers.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shares = {name: method.kept for _, method, names in plan.rewrites if method.cuts for name in names}
    dense: dict[str, int] = {}
    saved: dict[str, int] = {}
    cut: dict[str, list[tuple[int, int]]] = {}
    largest = 0
    layers: dict[str, dict[tuple[str, int], list[LayerPlan]]] = {}
    for name, tensor in model.state_dict().items():
        index = _index(name, blocks)
        if name not in tied:
            dense[index] = dense.get(index, 0) + tensor.nbytes
        if not index:
            largest = max(largest, tensor.nbytes)
        linear = name.removesuffix(".weight")
        if linear in shares:
            rows, columns = tensor.shape
            transposed = is_transposed(model.get_submodule(linear))
            cut.setdefault(index, []).append((columns, rows) if transposed else (rows, columns))
            if linear not in plan.layers:
                saved[index] = saved.get(index, 0) + int((1 - shares[linear]) * tensor.nbytes)
    for name, layer in plan.layers.items():
        index = _index(name, blocks)
        size = math.prod(layer.shape) * model.dtype.itemsize
        saved[index] = saved.get(index, 0) + size - (stored_bytes(specs[name]) if name in specs else size)
        parent = name.rpartition(".")[0]
        layers.setdefault(index, {}).setdefault((parent, layer.shape[1]), []).append(layer)
    found = [
        _Block(size, size - saved.get(i, 0), tuple(map(tuple, layers.get(i, {}).values())), tuple(cut.get(i, ())))
        for i, size in dense.items()
        if i
    ]
    outside = dense.get("", 0)
    return found, (outside, outside - saved.get("", 0), largest)


def _index(name: str, blocks: str) -> str:
    """Number of the block that a name lies in; empty outside of them."""
    return name.removeprefix(blocks + ".").split(".", 1)[0] if name.startswith(blocks + ".") else ""


def _logits(config: Any, text: Text, item: int) -> int:
    """Of the first batch, in the dtype of the model and in float32 beside it."""
    return min(text.batch, 2 * text.seqlen) * config.vocab_size * item


def _kinds(stage: Sequence[LayerPlan]) -> set[type[Statistic]]:
    static = {AbsMax} if any(p.input is not None and p.input.static for p in stage) else set()
    return {Gram, *static, *(kind for p in stage for kind in p.method.gathers)}


def _statistics(stage: Sequence[LayerPlan], text: Text) -> int:
    return sum(kind.nbytes(stage[0].shape[1]) for kind in _kinds(stage)) if text.observed else 0


def _observe(block: _Block, plan: Plan, room: Room, text: Text, copies: int) -> int:
    """The statistics of a stage, or of the experts that one pass observes, beside the block."""
    if not text.observed:
        return block.dense * copies
    sizes = [_statistics(stage, text) for stage in block.stages]
    largest, together = max(sizes, default=0), sum(sizes)
    alike = max((sizes.count(size) * size for size in set(sizes)), default=0) if len(sizes) > 8 else largest
    wave = max(largest, min(alike, int(room.for_statistics())))
    product = block.widest() ** 2 // 2  # float32 products of an eighth of a Gram's rows
    return copies * block.dense + block.packed // 2 + min(wave, together) + product


def _solve(block: _Block, text: Text, copies: int) -> int:
    def stage(layers: Sequence[LayerPlan]) -> int:
        weights = sum(4 * math.prod(p.shape) for p in layers)
        by_method = {p.method: [q.shape for q in layers if q.method == p.method] for p in layers}
        largest = max(4 * math.prod(p.shape) for p in layers)
        gram = 4 * layers[0].shape[1] ** 2 if text.observed else 0  # in float32, for the error
        working = max(weights + max(m.workspace(shapes) for m, shapes in by_method.items()), _SETTLED * largest + gram)
        return _statistics(layers, text) + weights // 4 + working

    return copies * block.dense + block.packed // 2 + max(map(stage, block.stages), default=0)


def _allocate(block: _Block, forward: int) -> int:
    """Gram matrices of the dense block's inputs, its weights in float32, and a pass or one layer's curve."""
    grams = sum(Gram.nbytes(stage[0].shape[1]) for stage in block.stages)
    layers = [layer for stage in block.stages for layer in stage]
    curve = max((layer.method.workspace([layer.shape]) for layer in layers), default=0)
    return block.dense + grams + sum(4 * math.prod(layer.shape) for layer in layers) + max(forward, curve)


def _rewrite(block: _Block, plan: Plan, room: Room, forward: int) -> int:
    """Float32 weights of the block, what a method gathers of all its inputs at once, and a pass or what it works in."""
    kinds: set[type[Statistic]] = {Gram, *(kind for _, method, _ in plan.rewrites for kind in method.gathers)}
    inputs = [stage[0].shape[1] for stage in block.stages] or _inputs(block.cut)
    together = sum(sum(kind.nbytes(width) for kind in kinds) for width in inputs)
    solved = sum(4 * math.prod(p.shape) for stage in block.stages for p in stage)
    weights = 2 * solved or sum(4 * math.prod(shape) for shape in block.cut)
    largest = max((kind.nbytes(block.widest()) for kind in kinds), default=0)
    widest = max(block.cut, key=lambda shape: shape[1], default=(0, 0))
    working = max((method.workspace(widest) for _, method, _ in plan.rewrites), default=0)
    held = max(largest, min(together, int(room.for_statistics())))
    return block.dense + weights + held + max(forward, working)


def _inputs(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Widths of the inputs of an attention's and an MLP's linears, those that they share once: all but the outputs'."""
    widths = [width for _, width in shapes]
    return [*dict.fromkeys(widths), *([widths[0]] * 2 if widths else [])]


def _tune(plan: Plan, parts: Sequence[_Block]) -> list[int]:
    """Adam's two moments, gradients and weights, of a block or of the whole model."""
    whole = any(tuner.level == "model" for _, tuner, _ in plan.tuners)
    sizes = [4 * sum(4 * math.prod(p.shape) for stage in b.stages for p in stage) + b.dense for b in parts]
    return [sum(sizes)] if whole else sizes


def _tail(model: Any, plan: Plan, blocks: str, text: Text) -> int:
    """Layers outside the blocks that are compressed, one after the other."""
    found = [p for name, p in plan.layers.items() if not name.startswith(blocks + ".")]
    return max((_statistics([p], text) + _SETTLED * 4 * math.prod(p.shape) for p in found), default=0)
