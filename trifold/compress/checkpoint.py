"""Writing a compressed checkpoint: shards, index, config, and the files that go with a model."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trifold.compress.journal import save_synced, write_synced
from trifold.core.errors import InputError, ResourceError

FORMAT_VERSION = "1.0"
QUANT_METHOD = "trifold"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """Bytes of '5GB', '200 MiB' or a number. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise InputError(f"--max-shard-size {text!r}: write it as 5GB, 200MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_output(output: Path) -> None:
    """Raise InputError unless `output` is absent or an empty folder, in a place that can be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: already exists and is not empty; choose another folder or remove it")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{output}: {parent} cannot be written; choose another folder")


def check_partial(partial: Path) -> None:
    """Raise InputError if the folder for unfinished work is there and is not ours."""
    if partial.exists() and any(partial.iterdir()) and not (partial / "journal" / "fingerprint.json").exists():
        raise InputError(f"{partial}: holds something else, but unfinished work has to go there; move it away")


@contextmanager
def disk_errors(folder: Path):
    """Turn a full or read-only disk into a ResourceError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM):
            reason = os.strerror(error.errno)
            raise ResourceError(f"{folder}: {reason}; make room, then run the same command to go on") from error
        raise
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and "space" in str(error).lower():
            raise ResourceError(f"{folder}: {error}; make room, then run the same command to go on") from error
        raise


def write_shards(folder: Path, units: Iterable[Mapping[str, torch.Tensor]], max_shard: int) -> None:
    """Write tensors, given in units that need not stay in memory together, as one file or an indexed set."""
    pending: dict[str, torch.Tensor] = {}
    size, shards, total = 0, list[tuple[Path, list[str]]](), 0

    def flush() -> None:
        nonlocal size
        path = folder / f"shard-{len(shards):05d}.safetensors"
        save_synced(dict(sorted(pending.items())), path)
        shards.append((path, sorted(pending)))
        pending.clear()
        size = 0

    for unit in units:
        for name, tensor in unit.items():
            if pending and size + tensor.nbytes > max_shard:
                flush()
            pending[name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
    flush()
    weight_map = {}
    for number, (path, names) in enumerate(shards, 1):
        single = len(shards) == 1
        final = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(path, folder / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_synced(folder / "model.safetensors.index.json", _json(index))


def quantization_block(contents: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config`: how to read the weights."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **contents}


def write_config(folder: Path, config: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """config.json: the source's own, with the block that says how to read the weights."""
    write_synced(folder / "config.json", _json({**config, "quantization_config": quantization_block(contents)}))


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """report.json beside the weights."""
    write_synced(folder / "report.json", _json(report))


def publish(partial: Path, output: Path) -> None:
    """The one rename that makes the checkpoint appear."""
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    descriptor = os.open(output.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(partial: Path) -> None:
    """Remove unfinished output."""
    shutil.rmtree(partial, ignore_errors=True)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
