"""A compressed checkpoint as a folder of safetensors in the layouts of other ecosystems, or dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.compress import checkpoint
from trifold.compress.export_layers import layers_of
from trifold.compress.packed_folder import PackedFolder
from trifold.compress.requantize import Losses, Way, blank, find_way, parts_of
from trifold.compress.tensor_file import Entry, stored, write_tensors
from trifold.core.canonical import Canonical
from trifold.core.errors import InputError, ProofError
from trifold.core.linears import is_linear, is_transposed
from trifold.core.scheme import Scheme
from trifold.ecosystem import CODECS, ECOSYSTEMS, Codec, Settings, nearest
from trifold.ecosystem.engines import ENGINES, Engine, check_layers, engine_refusal, runs
from trifold.ecosystem.experts import PLAIN, ExpertNames, names_of, parted
from trifold.formats import Spec

DENSE, MIXED = "dense", "compressed-tensors"
_DENSE_ENGINES = ("transformers", "vllm", "sglang")


@dataclass(frozen=True)
class SafetensorsPlan:
    """config: of the output. encode: of each layer, its tensors by their whole names. layouts: how many layers are
    in which. dtype: of dense tensors, None to leave each its own. files: JSON beside config.json. gone: tensors left
    out. names: of experts. losses: filled as layers are encoded. notices: what the user should know.
    engines: that load it."""

    config: dict[str, Any]
    encode: Mapping[str, Callable[[], dict[str, torch.Tensor]]]
    layouts: dict[str, int]
    dtype: torch.dtype | None
    files: Mapping[str, Any]
    gone: frozenset[str]
    names: ExpertNames
    losses: Losses
    notices: list[str]
    engines: tuple[str, ...]


def plan_safetensors(source: PackedFolder, to: str, engine: Engine | None, model: Any, again: bool) -> SafetensorsPlan:
    """What will be written. to: a codec, `DENSE`, or `MIXED`, which chooses a layout for each layer. model: without
    weights, in the dtype of the output. again: whether to round what cannot be held.

    Raises InputError for the first layer that is not held exactly, or that the engine does not run.
    """
    names, losses = names_of(source.config.get("model_type")) or PLAIN, Losses()
    modules, ordered, gone = layers_of(source, model)
    config = {**source.config, "dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if to == DENSE:
        encode = {name: partial(_dense, source, name, names, modules[name], model.dtype) for name in ordered}
        return SafetensorsPlan(
            config, encode, {DENSE: len(encode)}, model.dtype, {}, gone, names, losses, [], _DENSE_ENGINES
        )
    choose = partial(_choose, source, names, to, engine, model.dtype, again)
    layers = {name: choose(name, modules[name]) for name in ordered}
    if again and (common := _common(layers.values())):
        layers = {name: choose(name, modules[name], common) for name in ordered}
    outward = {each: (layer.codec, layer.settings) for name, layer in layers.items() for each in names.outward(name)}
    others = {each: m for name, m in modules.items() if name not in layers for each in names.outward(name)}
    dense = [name for name, module in others.items() if isinstance(module, nn.Linear)]
    routers = [name for name, module in others.items() if _is_router(module)]
    kinds = {e: (la.codec, la.settings, la.header) for name, la in layers.items() for e in names.outward(name)}
    notices = [] if engine is None else check_layers(engine, kinds, frozenset(dense))
    ecosystem = ECOSYSTEMS[next(iter(layers.values())).codec.ecosystem]
    block = ecosystem.write(outward, dense, routers)
    config["quantization_config"] = block
    used = [layer.codec.name for layer in layers.values()]
    return SafetensorsPlan(
        config,
        {name: partial(_encoded, source, name, names, layer, model.dtype, losses) for name, layer in layers.items()},
        {name: used.count(name) for name in sorted(set(used))},
        None,
        {"quantize_config.json": block} if ecosystem.method == "gptq" else {},
        gone,
        names,
        losses,
        notices,
        tuple(each.name for each in ENGINES.values() if runs(each, kinds, frozenset(dense))),
    )


def _is_router(module: nn.Module) -> bool:
    """Whether it has a matrix of its own, which engines take for a linear layer, and is none of torch."""
    own = module._parameters.get("weight")
    return own is not None and own.ndim == 2 and not isinstance(module, nn.Embedding | nn.Linear)


@dataclass(frozen=True)
class _Layer:
    """codec, settings: of what is written. header: stands for each part, its codes not read. way: how each part becomes
    that, None if it is."""

    codec: Codec
    settings: Settings
    header: Canonical
    way: Way | None


def _choose(
    source: PackedFolder,
    names: ExpertNames,
    to: str,
    engine: Engine | None,
    dtype: torch.dtype,
    again: bool,
    name: str,
    module: nn.Module,
    common: Scheme | None = None,
) -> _Layer:
    """How a layer is held. common: the scheme it has to have. Raises InputError if it cannot be held, with what can."""
    if not is_linear(module) or is_transposed(module):
        kind = type(module).__name__
        raise InputError(f"{name}: {to} cannot hold it: {kind} is no linear layer of torch; --to {DENSE} can")
    weight, count = source.weight(name, codes=False), len(names.outward(name))
    codec = CODECS.get(_layout(source.modules[name]) if to == MIXED else to)

    def refusal(weight: Canonical) -> str | None:
        why = codec.refusal(weight, dtype)
        if why is None and engine is not None:
            why = engine_refusal(engine, names.outward(name)[0], codec, weight)
        return why

    way, parts = None, (parts_of if again else parted)(weight, count)
    for part in parts:
        why = refusal(part)
        way = way if why is None else find_way(part, refusal) if again else None
        if why is not None and way is None:
            if codec.refusal(part, dtype) is None:  # it is the engine that does not run it
                raise InputError(f"{name}: {why}")
            out = "" if again else ", and --requantize rounds it again"
            raise InputError(f"{name}: {to} cannot hold it: {why}; --to {nearest(part, dtype)} can{out}")
    if common is not None and codec.settings(_header(parts[0], way)) != codec.settings(blank(parts[0].shape, common)):
        way = Way(common)
    header = _header(parts[0], way)
    return _Layer(codec, codec.settings(header), header, way)


def _header(weight: Canonical, way: Way | None) -> Canonical:
    return way.header(weight) if way else weight


def _common(layers: Collection[_Layer]) -> Scheme | None:
    """The scheme for all layers where a format has one setting for all and theirs differ: the most bits, the smallest
    groups. None if there is nothing to change, or none that all can have."""
    settings = [layer.settings for layer in layers]
    if "group_size" not in settings[0] or all(each == settings[0] for each in settings):
        return None
    groups = [each["group_size"] for each in settings if each["group_size"] > 0]
    even = all(each.get("sym", False) for each in settings)
    for symmetric in (even, not even):
        scheme = Scheme(max(each["bits"] for each in settings), min(groups, default="channel"), symmetric, "float16")
        if all(layer.codec.refusal(blank(layer.header.shape, scheme), torch.float16) is None for layer in layers):
            return scheme
    return None


def _layout(spec: Spec) -> str:
    """Which layout of compressed-tensors engines have kernels for: bytes are for integers that meet integers."""
    if spec["format"] == "fp8":
        return "float-quantized"
    return "int-quantized" if spec.get("input") and spec.get("bits") == 8 else "pack-quantized"


def _encoded(
    source: PackedFolder, name: str, names: ExpertNames, layer: _Layer, dtype: torch.dtype, losses: Losses
) -> dict[str, torch.Tensor]:
    found, outward, codec = {}, names.outward(name), layer.codec
    for each, part in zip(outward, parts_of(source.weight(name), len(outward)), strict=True):
        held = layer.way(part) if layer.way else part
        losses.add(each, part, held)
        tensors = codec.encode(held, dtype)
        if not torch.equal(codec.decode(tensors, layer.settings).dequantize(), held.dequantize()):
            raise ProofError(f"{each}: what {codec.name} reads back is another weight")
        found.update({f"{each}.{leaf}": tensor for leaf, tensor in tensors.items()})
    return found


def _dense(
    source: PackedFolder, name: str, names: ExpertNames, module: nn.Module, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    weight, outward = source.weight(name).dequantize(), names.outward(name)
    weight = (weight.T if is_transposed(module) else weight).to(dtype)
    parts = weight.chunk(len(outward))
    return {f"{each}.weight": part.contiguous() for each, part in zip(outward, parts, strict=True)}


def write_safetensors(source: PackedFolder, plan: SafetensorsPlan, folder: Path, work: Path, max_shard: int) -> int:
    """Tensors and config; returns the bytes of tensors. work: an empty folder, for what is encoded before it goes into
    shards of at most `max_shard` bytes."""
    for number, encode in enumerate(plan.encode.values()):
        write_tensors(work / str(number), {name: Entry.of(tensor) for name, tensor in encode().items()})
    total = 0

    def units() -> Iterator[dict[str, Entry]]:
        nonlocal total
        packed = source.packed_names()
        kept = {k: e for k, e in source.tensors.items() if k not in packed | plan.gone}
        rest = {plan.names.outward(name)[0]: _cast(entry, plan.dtype) for name, entry in kept.items()}
        for unit in ({name: entry} for name, entry in sorted(rest.items())):
            total += sum(entry.nbytes for entry in unit.values())
            yield unit
        for number in range(len(plan.encode)):
            unit = stored(work / str(number))
            total += sum(entry.nbytes for entry in unit.values())
            yield unit

    checkpoint.write_shards(folder, units(), max_shard)
    for name, data in {"config.json": plan.config, **plan.files}.items():
        checkpoint.write_json(folder / name, data)
    return total


def _cast(entry: Entry, dtype: torch.dtype | None) -> Entry:
    """The entry in another dtype, if it is of floats."""
    if dtype is None or not entry.dtype.is_floating_point:
        return entry
    return Entry(entry.shape, dtype, lambda: entry.load().to(dtype))
