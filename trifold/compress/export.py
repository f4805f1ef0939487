"""A compressed checkpoint written as another ecosystem's loaders want it: the same codes in other words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.compress import checkpoint
from trifold.compress.export_gguf import GgufPlan, plan_gguf, write_gguf
from trifold.compress.files import copy_companions, float_dtype, model_folder, parse_size, reason
from trifold.compress.folder import meta_model
from trifold.compress.journal import sync_folder
from trifold.compress.packed_folder import PackedFolder, open_packed
from trifold.compress.requantize import Losses, Way, blank, find_way, parts_of
from trifold.compress.tensor_file import Entry, stored, write_tensors
from trifold.core.canonical import Canonical
from trifold.core.errors import CheckpointError, InputError, ProofError, unknown_name
from trifold.core.linears import is_linear, is_transposed
from trifold.core.scheme import Scheme
from trifold.ecosystem import CODECS, ECOSYSTEMS, Codec, Settings, nearest
from trifold.ecosystem.experts import PLAIN, ExpertNames, is_expert, names_of, parted
from trifold.formats import Spec
from trifold.kernels import PackedExperts, is_stacked, unstack

DENSE, MIXED, GGUF = "dense", "compressed-tensors", "gguf"
_NOT_COPIED = ("config.json", "report.json", "quantize_config.json", "quant_config.json")


def format_names() -> list[str]:
    """What a checkpoint can be exported to."""
    return [DENSE, MIXED, GGUF, *CODECS]


def export(
    model: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
    requantize: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a compressed checkpoint in another format; codes, zero-points and scales stay what they are.

    model: a folder or hub id of a checkpoint of ours, compressed-tensors, GPTQ or AWQ. to: one of `format_names()`;
    `compressed-tensors` chooses among its layouts for each layer, `dense` dequantises. output: a folder, or with
    `gguf` a file that ends so, that must not exist yet, and does not unless all of it is written. dtype: of dense
    tensors, only to `dense`; "auto" is the checkpoint's. requantize: round what the format cannot hold a second time,
    to the nearest scheme that it can. Tensors pass through memory one layer at a time.

    Returns the report: format, layers by layout, bytes; with requantize also which layers changed by how much. Raises
    InputError, before anything is written, for the first layer that the format cannot hold exactly, with the nearest
    format that can; ResourceError if the disk fails.
    """
    place, shard = Path(output).expanduser(), parse_size(max_shard_size, "--max-shard-size")
    if to not in format_names():
        raise InputError(unknown_name("export format", to, format_names()))
    if to != DENSE and dtype != "auto":
        raise InputError(f"dtype={dtype}: only --to dense changes it; leave it out")
    checkpoint.check_output(place)
    partial_folder = place.with_name(place.name + ".partial")
    if os.path.lexists(partial_folder):
        raise InputError(f"{partial_folder}: exists, but unfinished work has to go there; move it away")
    source = open_packed(model_folder(model))
    skeleton = _skeleton(source, dtype, trust_remote_code)
    plan = _plan_gguf(source, skeleton, requantize) if to == GGUF else _plan(source, to, skeleton, requantize)
    try:
        with checkpoint.disk_errors(partial_folder):
            partial_folder.mkdir(parents=True)
            if isinstance(plan, GgufPlan):
                total = _write_gguf(source, plan, partial_folder, place)
            else:
                total = _write(source, plan, partial_folder, shard)
                checkpoint.publish(partial_folder, place)
    except BaseException:
        checkpoint.discard(partial_folder)
        raise
    report = {"format": to, "output": str(place), "layers": plan.layouts, "total_bytes": total}
    return {**report, **plan.losses.report()} if requantize else report


@dataclass(frozen=True)
class _Plan:
    """config: of the output. encode: of each layer, its tensors by their whole names. layouts: how many layers are
    in which. dtype: of dense tensors, None to leave each its own. files: JSON beside config.json. gone: tensors left
    out. names: of experts. losses: filled as layers are encoded."""

    config: dict[str, Any]
    encode: Mapping[str, Callable[[], dict[str, torch.Tensor]]]
    layouts: dict[str, int]
    dtype: torch.dtype | None
    files: Mapping[str, Any]
    gone: frozenset[str]
    names: ExpertNames
    losses: Losses


def _skeleton(source: PackedFolder, dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    """The model without weights, in the dtype that the output will have."""
    from transformers import AutoConfig

    path = source.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of every kind
        raise CheckpointError(f"{path}: {reason(error)}") from error
    del config.quantization_config
    wanted = (config.dtype or source.stored_dtype) if dtype == "auto" else float_dtype(dtype)
    return meta_model(config, wanted, path, trust_remote_code)


def _layers(source: PackedFolder, model: Any) -> tuple[dict[str, nn.Module], list[str], frozenset[str]]:
    """Modules of the skeleton, with experts apart; which are packed; tensors to leave out."""
    known = set(model.state_dict())
    _unstack(source, model)
    modules = dict(model.named_modules())
    for name in source.modules:
        if name not in modules:
            raise CheckpointError(f"{source.folder}: {name} is quantised, but the architecture has no such layer")
    gone = frozenset(
        name
        for name, entry in source.tensors.items()
        if name not in known and name.endswith(".bias") and not entry.load().any()
    )  # zeros that some tools store for layers without a bias
    return modules, [name for name in modules if name in source.modules], gone


def _plan_gguf(source: PackedFolder, model: Any, again: bool) -> GgufPlan:
    _, packed, gone = _layers(source, model)
    without = source.packed_names() | gone
    dense = {name: entry for name, entry in source.tensors.items() if name not in without}
    return plan_gguf(source, model, packed, dense, again)


def _plan(source: PackedFolder, to: str, model: Any, again: bool) -> _Plan:
    names, losses = names_of(source.config.get("model_type")) or PLAIN, Losses()
    modules, ordered, gone = _layers(source, model)
    config = {**source.config, "dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if to == DENSE:
        encode = {name: partial(_dense, source, name, names, modules[name], model.dtype) for name in ordered}
        return _Plan(config, encode, {DENSE: len(encode)}, model.dtype, {}, gone, names, losses)
    choose = partial(_choose, source, names, to, model.dtype, again)
    layers = {name: choose(name, modules[name]) for name in ordered}
    if again and (common := _common(layers.values())):
        layers = {name: choose(name, modules[name], common) for name in ordered}
    outward = {each: (layer.codec, layer.settings) for name, layer in layers.items() for each in names.outward(name)}
    others = {each: m for name, m in modules.items() if name not in layers for each in names.outward(name)}
    dense = [name for name, module in others.items() if isinstance(module, nn.Linear)]
    routers = [name for name, module in others.items() if _is_router(module)]
    ecosystem = ECOSYSTEMS[next(iter(layers.values())).codec.ecosystem]
    block = ecosystem.write(outward, dense, routers)
    config["quantization_config"] = block
    layouts = [layer.codec.name for layer in layers.values()]
    return _Plan(
        config,
        {name: partial(_encoded, source, name, names, layer, model.dtype, losses) for name, layer in layers.items()},
        {name: layouts.count(name) for name in sorted(set(layouts))},
        None,
        {"quantize_config.json": block} if ecosystem.method == "gptq" else {},
        gone,
        names,
        losses,
    )


def _unstack(source: PackedFolder, model: Any) -> None:
    """Take the experts of the skeleton apart. Raises InputError for those whose names elsewhere are not known."""
    unstack(model, set(source.modules))
    stacked = next((name for name, module in model.named_modules() if is_stacked(module)), None)
    if stacked is not None:
        raise InputError(f"{stacked}: experts that stay dense are not exported yet; the checkpoint runs as it is")
    family = source.config.get("model_type")
    expert = next(filter(is_expert, source.modules), None)
    apart = any(isinstance(module, PackedExperts) for module in model.modules())
    if apart and (expert is None or names_of(family) is None):
        raise InputError(f"{source.folder}: experts of {family} are not exported yet; the checkpoint runs as it is")


def _is_router(module: nn.Module) -> bool:
    """Whether it has a matrix of its own, which engines take for a linear layer, and is none of torch."""
    own = module._parameters.get("weight")
    return own is not None and own.ndim == 2 and not isinstance(module, nn.Embedding | nn.Linear)


@dataclass(frozen=True)
class _Layer:
    """codec, settings: of what is written. shape: of each part. way: how each part becomes that, None if it is."""

    codec: Codec
    settings: Settings
    shape: tuple[int, int]
    way: Way | None


def _choose(
    source: PackedFolder,
    names: ExpertNames,
    to: str,
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
        return codec.refusal(weight, dtype)

    way, parts = None, (parts_of if again else parted)(weight, count)
    for part in parts:
        why = refusal(part)
        way = way if why is None else find_way(part, refusal) if again else None
        if why is not None and way is None:
            out = "" if again else ", and --requantize rounds it again"
            raise InputError(f"{name}: {to} cannot hold it: {why}; --to {nearest(part, dtype)} can{out}")
    if common is not None and codec.settings(_header(parts[0], way)) != codec.settings(blank(parts[0].shape, common)):
        way = Way(common)
    return _Layer(codec, codec.settings(_header(parts[0], way)), parts[0].shape, way)


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
        if all(layer.codec.refusal(blank(layer.shape, scheme), torch.float16) is None for layer in layers):
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


def _write_gguf(source: PackedFolder, plan: GgufPlan, folder: Path, place: Path) -> int:
    """The file, at `place` itself if that is its name, else in a folder with what came with the model."""
    alone = place.suffix == ".gguf"
    total = write_gguf(plan, folder / "model.gguf", source.folder)
    if not alone:
        copy_companions(source.folder, folder, without=_NOT_COPIED)
        checkpoint.publish(folder, place)
        return total
    if place.is_dir():  # an empty one
        place.rmdir()
    os.replace(folder / "model.gguf", place)
    sync_folder(place.absolute().parent)
    checkpoint.discard(folder)
    return total


def _write(source: PackedFolder, plan: _Plan, folder: Path, max_shard: int) -> int:
    """Everything; returns the bytes of tensors."""
    layers = folder / "layers"  # encoded, before they are put into shards
    layers.mkdir()
    for number, encode in enumerate(plan.encode.values()):
        write_tensors(layers / str(number), {name: Entry.of(tensor) for name, tensor in encode().items()})
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
            unit = stored(layers / str(number))
            total += sum(entry.nbytes for entry in unit.values())
            yield unit

    checkpoint.write_shards(folder, units(), max_shard)
    shutil.rmtree(layers)
    copy_companions(source.folder, folder, without=_NOT_COPIED)
    for name, data in {"config.json": plan.config, **plan.files}.items():
        checkpoint.write_json(folder / name, data)
    return total


def _cast(entry: Entry, dtype: torch.dtype | None) -> Entry:
    """The entry in another dtype, if it is of floats."""
    if dtype is None or not entry.dtype.is_floating_point:
        return entry
    return Entry(entry.shape, dtype, lambda: entry.load().to(dtype))
