"""Writing a compressed checkpoint: shards, index, config, and the files that go with a model."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trifold.compress.journal import sync_folder, write_entries, write_synced
from trifold.compress.tensor_file import Entry
from trifold.core.errors import CheckpointError, InputError, ResourceError

FORMAT_VERSION = "1.0"
QUANT_METHOD = "trifold"


def check_output(output: Path) -> None:
    """Raise InputError unless `output` is absent or an empty folder, in a place that can be written."""
    if not output.name:
        raise InputError(f"{output}: give the folder to create by name")
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(f"{output}: already exists and is not empty; choose another folder or remove it")
        parent = next(p for p in output.absolute().parents if p.exists())
    except OSError as error:
        raise InputError(f"{output}: cannot be used ({error.strerror}); choose another folder") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{output}: {parent} cannot be written; choose another folder")


def check_partial(partial: Path) -> None:
    """Raise InputError if the folder for unfinished work is there and is not ours."""
    if os.path.lexists(partial) and not (partial.is_dir() and _ours(partial)):
        raise InputError(f"{partial}: holds something else, but unfinished work has to go there; move it away")


def _ours(partial: Path) -> bool:
    """Whether the folder holds our journal, or nothing but the beginning of one, or a finished checkpoint."""
    if finished_report(partial) is not None:
        return True
    begun = {"journal", "fingerprint.json.tmp"}
    journal = partial / "journal"
    known = (journal / "fingerprint.json").exists() or any(journal.glob("block-*.safetensors"))
    return known or all(p.name in begun for p in partial.rglob("*"))


def finished_report(partial: Path) -> dict[str, Any] | None:
    """The report of a run that was broken off after its proof, when only the rename was missing."""
    try:
        report = json.loads((partial / "report.json").read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "fingerprint" in report else None


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """One process at a time works for one `output`. Raises InputError if another one does.

    The lock goes with the process, however it ends; the file beside `output` is removed.
    """
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = path.open("a+")
        try:
            _lock(handle.fileno())
        except BlockingIOError as error:
            handle.seek(0)
            raise InputError(
                f"{output}: another run (process {handle.read().strip() or 'unknown'}) is writing it; wait for it, or "
                "choose another folder"
            ) from error
        except OSError:  # a file system without locks
            break
        with suppress(OSError):
            if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                break
        handle.close()  # the one who held it has just removed it
    with handle:
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failing environment (disk full or read-only, no memory) into a ResourceError that says what to do."""
    try:
        yield
    except OSError as error:
        raise _resource_error(error.filename or folder, error.errno, str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _resource_error(folder, errno.ENOMEM) from error
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number or "can't allocate memory" in str(error):
            raise _resource_error(folder, int(number[1]) if number else errno.ENOMEM) from error
        raise


def _resource_error(where: Path | str, number: int | None, text: str = "") -> ResourceError:
    advice = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "mend it"
    problem = os.strerror(number) if number else text
    return ResourceError(f"{where}: {problem}; {advice}, then run the same command to go on")


def write_shards(folder: Path, units: Iterable[Mapping[str, Entry]], max_shard: int) -> None:
    """Write tensors, fetched one by one, as one file or an indexed set.

    Files of an earlier attempt, halves and temporary ones among them, are removed first.
    """
    for stale in folder.iterdir():
        if stale.is_file():
            stale.unlink()
    pending: dict[str, Entry] = {}
    size, shards, total = 0, list[tuple[Path, list[str]]](), 0

    def flush() -> None:
        nonlocal size
        path = folder / f"shard-{len(shards):05d}.safetensors"
        write_entries(pending, path)
        shards.append((path, sorted(pending)))
        pending.clear()
        size = 0

    for unit in units:
        for name, entry in unit.items():
            if pending and size + entry.nbytes > max_shard:
                flush()
            pending[name] = entry
            size += entry.nbytes
            total += entry.nbytes
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


def check_version(version: Any) -> None:
    """Raise CheckpointError for a format of a newer major version, naming what is needed."""
    major, ours = str(version).split(".")[0], FORMAT_VERSION.split(".")[0]
    if not major.isdecimal():
        raise CheckpointError(f"config.json: format_version {version!r} is no version; copy the checkpoint again")
    if int(major) > int(ours):
        raise CheckpointError(
            f"checkpoint format {version} is newer than this Trifold reads ({FORMAT_VERSION}); "
            f"install a version that reads format {major}: pip install --upgrade trifold"
        )


def quantization_block(contents: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config`: how to read the weights."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **contents}


def write_config(folder: Path, config: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """config.json: the source's own, with the block that says how to read the weights."""
    write_synced(folder / "config.json", _json({**config, "quantization_config": quantization_block(contents)}))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A JSON file as all of ours are: sorted keys, UTF-8, whole or not at all."""
    write_synced(path, _json(data))


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """report.json beside the weights."""
    write_synced(folder / "report.json", _json(report))


def publish(partial: Path, output: Path) -> None:
    """The one rename that makes the checkpoint appear."""
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    sync_folder(output.absolute().parent)


def discard(partial: Path) -> None:
    """Remove unfinished output."""
    shutil.rmtree(partial, ignore_errors=True)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
