"""A compressed checkpoint written as another ecosystem's loaders want it: the same codes in other words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.compress import checkpoint
from trifold.compress.files import copy_companions, float_dtype, model_folder, reason
from trifold.compress.folder import meta_model
from trifold.compress.packed_folder import PackedFolder, open_packed
from trifold.compress.tensor_file import Entry, stored, write_tensors
from trifold.core.errors import CheckpointError, InputError, ProofError, unknown_name
from trifold.core.linears import is_linear, is_transposed
from trifold.ecosystem import CODECS, ECOSYSTEMS, Codec, Settings, nearest
from trifold.formats import Spec

DENSE, MIXED = "dense", "compressed-tensors"
_NOT_COPIED = ("config.json", "report.json", "quantize_config.json", "quant_config.json")


def format_names() -> list[str]:
    """What a checkpoint can be exported to."""
    return [DENSE, MIXED, *CODECS]


def export(
    model: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a compressed checkpoint in another format; codes, zero-points and scales stay what they are.

    model: a folder or hub id of a checkpoint of ours, compressed-tensors, GPTQ or AWQ. to: one of `format_names()`;
    `compressed-tensors` chooses among its layouts for each layer, `dense` dequantises. output: a folder that must not
    exist yet, and does not unless all of it is written. dtype: of dense tensors, only to `dense`; "auto" is the
    checkpoint's. Tensors pass through memory one layer at a time.

    Returns the report: format, layers by layout, bytes. Raises InputError, before anything is written, for the first
    layer that the format cannot hold exactly, with the nearest format that can; ResourceError if the disk fails.
    """
    place, shard = Path(output).expanduser(), checkpoint.parse_size(max_shard_size)
    if to not in format_names():
        raise InputError(unknown_name("export format", to, format_names()))
    if to != DENSE and dtype != "auto":
        raise InputError(f"dtype={dtype}: only --to dense changes it; leave it out")
    checkpoint.check_output(place)
    partial_folder = place.with_name(place.name + ".partial")
    if os.path.lexists(partial_folder):
        raise InputError(f"{partial_folder}: exists, but unfinished work has to go there; move it away")
    source = open_packed(model_folder(model))
    plan = _plan(source, to, _skeleton(source, dtype, trust_remote_code))
    try:
        with checkpoint.disk_errors(partial_folder):
            partial_folder.mkdir(parents=True)
            total = _write(source, plan, partial_folder, shard)
            checkpoint.publish(partial_folder, place)
    except BaseException:
        checkpoint.discard(partial_folder)
        raise
    return {"format": to, "output": str(place), "layers": plan.layouts, "total_bytes": total}


@dataclass(frozen=True)
class _Plan:
    """config: of the output. encode: of each layer, its tensors by their whole names. layouts: how many layers are
    in which. dtype: of dense tensors, None to leave each its own. files: JSON beside config.json. gone: tensors left
    out."""

    config: dict[str, Any]
    encode: Mapping[str, Callable[[], dict[str, torch.Tensor]]]
    layouts: dict[str, int]
    dtype: torch.dtype | None
    files: Mapping[str, Any]
    gone: frozenset[str]


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


def _plan(source: PackedFolder, to: str, model: Any) -> _Plan:
    modules = dict(model.named_modules())
    for name in source.modules:
        if name not in modules:
            raise InputError(f"{name}: experts of a mixture are not exported yet; the checkpoint runs as it is")
    ordered = [name for name in modules if name in source.modules]
    known = set(model.state_dict())
    gone = frozenset(
        name
        for name, entry in source.tensors.items()
        if name not in known and name.endswith(".bias") and not entry.load().any()
    )  # zeros that some tools store for layers without a bias
    config = {**source.config, "dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if to == DENSE:
        encode = {name: partial(_dense, source, name, modules[name], model.dtype) for name in ordered}
        return _Plan(config, encode, {DENSE: len(encode)}, model.dtype, {}, gone)
    layers = {name: _choose(source, name, to, modules[name], model.dtype) for name in ordered}
    others = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in layers]
    ecosystem = ECOSYSTEMS[next(iter(layers.values()))[0].ecosystem]
    block = ecosystem.write(layers, others)
    config["quantization_config"] = block
    layouts = [codec.name for codec, _ in layers.values()]
    return _Plan(
        config,
        {name: partial(_encoded, source, name, *chosen, model.dtype) for name, chosen in layers.items()},
        {name: layouts.count(name) for name in sorted(set(layouts))},
        None,
        {"quantize_config.json": block} if ecosystem.method == "gptq" else {},
        gone,
    )


def _choose(source: PackedFolder, name: str, to: str, module: nn.Module, dtype: torch.dtype) -> tuple[Codec, Settings]:
    """Codec and settings of a layer. Raises InputError if it cannot be held, with what can."""
    if not is_linear(module) or is_transposed(module):
        kind = type(module).__name__
        raise InputError(f"{name}: {to} cannot hold it: {kind} is no linear layer of torch; --to {DENSE} can")
    weight = source.weight(name, codes=False)
    codec = CODECS.get(_layout(source.modules[name]) if to == MIXED else to)
    why = codec.refusal(weight, dtype)
    if why is not None:
        raise InputError(f"{name}: {to} cannot hold it: {why}; --to {nearest(weight, dtype)} can")
    return codec, codec.settings(weight)


def _layout(spec: Spec) -> str:
    """Which layout of compressed-tensors engines have kernels for: bytes are for integers that meet integers."""
    if spec["format"] == "fp8":
        return "float-quantized"
    return "int-quantized" if spec.get("input") and spec.get("bits") == 8 else "pack-quantized"


def _encoded(
    source: PackedFolder, name: str, codec: Codec, settings: Settings, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    weight = source.weight(name)
    tensors = codec.encode(weight, dtype)
    if not torch.equal(codec.decode(tensors, settings).dequantize(), weight.dequantize()):
        raise ProofError(f"{name}: what {codec.name} reads back is another weight")
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _dense(source: PackedFolder, name: str, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weight = source.weight(name).dequantize()
    return {f"{name}.weight": (weight.T if is_transposed(module) else weight).to(dtype).contiguous()}


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
        rest = {k: _cast(e, plan.dtype) for k, e in source.tensors.items() if k not in packed | plan.gone}
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
