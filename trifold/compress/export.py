"""A compressed checkpoint written as another ecosystem's loaders want it: the same codes in other words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.compress import checkpoint
from trifold.compress.card import NAME, Card, front_of, read_evaluation
from trifold.compress.export_gguf import GgufPlan, plan_gguf, write_gguf
from trifold.compress.files import copy_companions, float_dtype, model_folder, parse_size, reason
from trifold.compress.folder import meta_model
from trifold.compress.hub import check_hub, push
from trifold.compress.journal import sync_folder
from trifold.compress.packed_folder import PackedFolder, open_packed, read_json
from trifold.compress.requantize import Losses, Way, blank, find_way, parts_of
from trifold.compress.summary import summarise
from trifold.compress.tensor_file import Entry, stored, write_tensors
from trifold.core.canonical import Canonical
from trifold.core.errors import CheckpointError, InputError, ProofError, unknown_name
from trifold.core.linears import is_linear, is_transposed
from trifold.core.scheme import Scheme
from trifold.ecosystem import CODECS, ECOSYSTEMS, Codec, Settings, nearest
from trifold.ecosystem.engines import ENGINES, Engine, check_layers, engine_of, engine_refusal, runs
from trifold.ecosystem.experts import PLAIN, ExpertNames, is_expert, names_of, parted
from trifold.formats import Spec
from trifold.kernels import PackedExperts, is_stacked, unstack

DENSE, MIXED, GGUF = "dense", "compressed-tensors", "gguf"
_DENSE_ENGINES = ("transformers", "vllm", "sglang")
_WORK = ".export"  # a folder in that of unfinished work, which is told by it
_NOT_COPIED = ("config.json", "report.json", "quantize_config.json", "quant_config.json", NAME)


def format_names() -> list[str]:
    """What a checkpoint can be exported to."""
    return [DENSE, MIXED, GGUF, *CODECS]


def export(
    model: str | os.PathLike[str],
    to: str | None,
    output: str | os.PathLike[str],
    *,
    engine: str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
    requantize: bool = False,
    evaluation: str | os.PathLike[str] | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a compressed checkpoint in another format; codes, zero-points and scales stay what they are.

    model: a folder or hub id of a checkpoint of ours, compressed-tensors, GPTQ or AWQ. to: one of `format_names()`;
    `compressed-tensors` chooses among its layouts for each layer, `dense` dequantises; None is the best for the engine.
    output: a folder, or with `gguf` a file that ends so, that must not exist yet, and does not unless all of it is
    written. engine: one of `ENGINES`, whose limits are checked too. dtype: of dense tensors, only to `dense`; "auto" is
    the checkpoint's. requantize: round what the format cannot hold a second time, to the nearest scheme that it can.
    evaluation: what `trifold eval --json` wrote, for the model card. push_to_hub: a repository that the finished output
    is uploaded to. Tensors pass through memory one layer at a time.

    Returns the report: format, layers by layout, bytes, notices; with requantize also which layers changed by how much.
    Raises InputError, before anything is written, for the first layer that the format cannot hold exactly, with the
    nearest format that can, or that the engine does not run; ResourceError if the disk, or the hub, fails.
    """
    place, shard = Path(output).expanduser(), parse_size(max_shard_size, "--max-shard-size")
    host = check_format(to, engine)
    scores = None if evaluation is None else read_evaluation(Path(evaluation))
    if to != DENSE and dtype != "auto":
        raise InputError(f"dtype={dtype}: only --to dense changes it; leave it out")
    checkpoint.check_output(place)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    source = open_packed(model_folder(model))
    chosen, plan = choose_plan(source, to, host, lambda: _skeleton(source, dtype, trust_remote_code), requantize)
    with checkpoint.locked(place), _unfinished(place) as partial_folder:
        alone = isinstance(plan, GgufPlan) and place.suffix == ".gguf"
        if isinstance(plan, GgufPlan):
            total = write_gguf(plan, partial_folder / "model.gguf", source.folder)
        else:
            total = _write(source, plan, partial_folder, shard)
        if alone:
            if place.is_dir():  # an empty one
                place.rmdir()
            os.replace(partial_folder / "model.gguf", place)
            sync_folder(place.absolute().parent)
            checkpoint.discard(partial_folder)
        else:
            copy_companions(source.folder, partial_folder, without=_NOT_COPIED)
            card = _card(source, chosen, plan, push_to_hub, total, scores)
            (partial_folder / NAME).write_text(card, encoding="utf-8")
            shutil.rmtree(partial_folder / _WORK)
            checkpoint.publish(partial_folder, place)
    report = {
        "format": chosen,
        "output": str(place),
        "layers": plan.layouts,
        "total_bytes": total,
        "notices": [] if isinstance(plan, GgufPlan) else plan.notices,
    }
    if requantize:
        report |= plan.losses.report()
    if push_to_hub is not None:
        report["pushed_to"] = push(place, push_to_hub, f"{place.name}, exported by Trifold as {chosen}")
    return report


def _card(
    source: PackedFolder, to: str, plan: _Plan | GgufPlan, name: str | None, total: int, scores: dict[str, Any] | None
) -> str:
    """The model card."""
    quantization = read_json(source.folder / "config.json")["quantization_config"]
    ours = quantization["quant_method"] == checkpoint.QUANT_METHOD
    layouts = ", ".join(f"{count} as {layout}" for layout, count in plan.layouts.items())
    rows = {"layers": layouts, "size": f"{total / 1e6:.2f} MB"}
    if to not in (DENSE, GGUF) and not plan.losses.layers:  # else other bits are stored
        rows["bits per compressed weight"] = f"{summarise(source.folder)['bits_per_weight']:.3f}"
    return Card(
        name=name,
        base=str(quantization["base_model"]) if ours else source.folder.resolve().name,
        layout=to,
        engines=("llama.cpp",) if isinstance(plan, GgufPlan) else plan.engines,
        facts=rows,
        recipe=quantization.get("recipe") if ours else None,
        front=front_of(source.folder),
        evaluation=scores,
        zero_points=any(spec.get("symmetric") is False for spec in source.modules.values()),
    ).text()


@contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """A folder beside `place` for unfinished work, gone afterwards; what a killed export left there goes first."""
    folder = place.with_name(place.name + ".partial")
    if os.path.lexists(folder):
        if not (folder / _WORK).is_dir():
            raise InputError(f"{folder}: exists, but unfinished work has to go there; move it away")
        checkpoint.discard(folder)
    try:
        with checkpoint.disk_errors(folder):
            (folder / _WORK).mkdir(parents=True)
            yield folder
    except BaseException:
        checkpoint.discard(folder)
        raise


def check_format(to: str | None, engine: str | None) -> Engine | None:
    """The engine of a name. Raises InputError for an unknown format or engine, or two that do not go together."""
    if to is not None and to not in format_names():
        raise InputError(unknown_name("export format", to, format_names()))
    if engine is None:
        if to is None:
            raise InputError("give a format with --to, or an engine with --engine")
        return None
    host = engine_of(engine)
    if to is not None and (to == GGUF) != (GGUF in host.formats):
        raise InputError(f"{host.name} does not load {to}; --to {host.formats[0]}, or leave --to out")
    return host


def choose_plan(
    source: PackedFolder, to: str | None, engine: Engine | None, skeleton: Callable[[], Any], again: bool
) -> tuple[str, _Plan | GgufPlan]:
    """The format, and what will be written. skeleton: makes the model without weights.

    Raises InputError for the first layer that the format cannot hold, or the engine not run: if there is a choice of
    formats, of the first of them.
    """
    formats = (to,) if to is not None else engine.formats if engine is not None else ()
    first: InputError | None = None
    for each in formats:
        try:
            if each == GGUF:
                return each, _plan_gguf(source, skeleton(), again)
            return each, _plan(source, each, engine, skeleton(), again)
        except CheckpointError:
            raise
        except InputError as error:
            first = first or error
    assert first is not None
    raise first


@dataclass(frozen=True)
class _Plan:
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


def _plan(source: PackedFolder, to: str, engine: Engine | None, model: Any, again: bool) -> _Plan:
    names, losses = names_of(source.config.get("model_type")) or PLAIN, Losses()
    modules, ordered, gone = _layers(source, model)
    config = {**source.config, "dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if to == DENSE:
        encode = {name: partial(_dense, source, name, names, modules[name], model.dtype) for name in ordered}
        return _Plan(config, encode, {DENSE: len(encode)}, model.dtype, {}, gone, names, losses, [], _DENSE_ENGINES)
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
        notices,
        tuple(each.name for each in ENGINES.values() if runs(each, kinds, frozenset(dense))),
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


def _write(source: PackedFolder, plan: _Plan, folder: Path, max_shard: int) -> int:
    """Everything; returns the bytes of tensors."""
    layers = folder / _WORK  # encoded, before they are put into shards
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
    for name, data in {"config.json": plan.config, **plan.files}.items():
        checkpoint.write_json(folder / name, data)
    return total


def _cast(entry: Entry, dtype: torch.dtype | None) -> Entry:
    """The entry in another dtype, if it is of floats."""
    if dtype is None or not entry.dtype.is_floating_point:
        return entry
    return Entry(entry.shape, dtype, lambda: entry.load().to(dtype))
