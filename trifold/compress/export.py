"""A compressed checkpoint written as another ecosystem's loaders want it: the same codes in other words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trifold.compress import checkpoint
from trifold.compress.card import NAME, Card, front_of, read_evaluation
from trifold.compress.export_gguf import GgufPlan, plan_gguf, write_gguf
from trifold.compress.export_safetensors import DENSE, MIXED, SafetensorsPlan, plan_safetensors, write_safetensors
from trifold.compress.files import copy_companions, float_dtype, model_folder, parse_size, reason
from trifold.compress.folder import meta_model
from trifold.compress.hub import check_hub, push
from trifold.compress.journal import sync_folder
from trifold.compress.packed_folder import PackedFolder, open_packed, read_json
from trifold.compress.summary import summarise
from trifold.core.errors import CheckpointError, InputError, unknown_name
from trifold.ecosystem import CODECS
from trifold.ecosystem.engines import Engine, engine_of

GGUF = "gguf"
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
            total = write_safetensors(source, plan, partial_folder, partial_folder / _WORK, shard)
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
        "notices": list(plan.notices),
    }
    if requantize:
        report |= plan.losses.report()
    if push_to_hub is not None:
        report["pushed_to"] = push(place, push_to_hub, f"{place.name}, exported by Trifold as {chosen}")
    return report


def _card(
    source: PackedFolder,
    to: str,
    plan: SafetensorsPlan | GgufPlan,
    name: str | None,
    total: int,
    scores: dict[str, Any] | None,
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
        engines=plan.engines,
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
) -> tuple[str, SafetensorsPlan | GgufPlan]:
    """The format, and what will be written. skeleton: makes the model without weights.

    Raises InputError for the first layer that the format cannot hold, or the engine not run: if there is a choice of
    formats, of the first of them.
    """
    formats = (to,) if to is not None else engine.formats if engine is not None else ()
    first: InputError | None = None
    for each in formats:
        try:
            if each == GGUF:
                return each, plan_gguf(source, skeleton(), again)
            return each, plan_safetensors(source, each, engine, skeleton(), again)
        except CheckpointError:
            raise
        except InputError as error:
            first = first or error
    assert first is not None
    raise first


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
