"""The journal of a running compression: what makes an interrupted run continue where it was.

It lives in OUT.partial/journal. Every finished block leaves its packed tensors, its report and the hidden
states that enter the next block; each file is written aside, synced to disk and renamed, and the JSON comes
last, so a block either counts whole or not at all. Every file holds its own checksum: a journal that the disk has
damaged is an error of the environment, never of the result, and stays where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from trifold.compress.tensor_file import Entry, check_digest, stored, write_tensors
from trifold.core.errors import InputError, ResourceError

if TYPE_CHECKING:
    from trifold.compress.compressed import Compressed


def reference(block: int) -> str:
    """The name under which the hidden states behind a block are kept for the proof."""
    return f"reference-{block:05d}"


class Journal:
    """Files of one run. `done` blocks are on disk; the tail after the blocks is not kept."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the journal, or begin one. Raises InputError if it belongs to a different run."""
        self.folder = folder
        stamp = folder / "fingerprint.json"
        ours = json.loads(json.dumps(fingerprint))
        if stamp.exists():
            theirs = _read_stamp(stamp)
            different = _difference(theirs, ours)
            if different:
                raise InputError(
                    f"{folder.parent}: an unfinished run with {different}; --fresh starts over, "
                    "or repeat the command that began it"
                )
        else:
            shutil.rmtree(folder, ignore_errors=True)  # blocks of no known run
            folder.mkdir(parents=True)
            _write_json(stamp, ours)
        self.done = 0
        while all(path.exists() for path in self._files(self.done)):
            self.done += 1
        while self.done and not self._hidden(self.done).exists():
            self.done -= 1  # its hidden states were never finished
        self._check()

    def _files(self, block: int) -> tuple[Path, Path, Path]:
        return self._json(block), self._shard(block), self.folder / f"{reference(block)}.safetensors"

    def _check(self) -> None:
        """Find damage before hours of work go on behind it."""
        for block in range(self.done):
            noted, *tensors = self._files(block)
            _read_json(noted)
            for path in tensors:
                _stored(path)
        if self.done:
            _stored(self._hidden(self.done))

    def _json(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"

    def _shard(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _hidden(self, done: int) -> Path:
        return self.folder / f"hidden-{done:05d}.safetensors"

    def write_block(
        self, block: int, compressed: Compressed, hidden: Sequence[Entry], carries: Mapping[str, Any]
    ) -> None:
        """Keep a finished block and the hidden states behind it."""
        save_synced(compressed.tensors, self._shard(block))
        write_entries({f"{i:05d}": h for i, h in enumerate(hidden)}, self._hidden(block + 1), digest=True)
        entry = {
            "modules": compressed.modules,
            "report": compressed.report,
            "digests": compressed.digests,
            "slices": compressed.slices,
            "carries": carries,
        }
        _write_json(self._json(block), entry)
        sync_folder(self.folder)
        self._hidden(block).unlink(missing_ok=True)
        self.done = block + 1

    def entry(self, block: int) -> dict[str, Any]:
        """What was noted of a finished block."""
        return _read_json(self._json(block))

    def hidden(self) -> Iterator[torch.Tensor]:
        """The hidden states behind the last finished block, one by one. Raises ResourceError if the file is damaged."""
        return _tensors(self._hidden(self.done))

    def block_tensors(self, block: int) -> dict[str, Entry]:
        """The packed tensors of a finished block, to be read when they are wanted."""
        return _stored(self._shard(block))

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a name, for the proof or for going on."""
        save_synced(tensors, self.folder / f"{name}.safetensors")

    def note(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        _write_json(self.folder / f"{name}.json", value)

    def noted(self, name: str) -> Any:
        """What `note` stored, None if it did not."""
        path = self.folder / f"{name}.json"
        return _read_json(path) if path.exists() else None

    def has(self, name: str) -> bool:
        """Whether `keep` stored something under this name."""
        return (self.folder / f"{name}.safetensors").exists()

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """What `keep` stored. Raises ResourceError if the file is damaged."""
        return {key: entry.load() for key, entry in _stored(self.folder / f"{name}.safetensors").items()}

    def remove(self) -> None:
        """Forget everything: the run is complete. Broken off half-way, what is left is a journal without blocks."""
        rest = sorted(self.folder.iterdir(), key=lambda path: not path.name.startswith("hidden-"))
        for path in rest:
            if path.name != "fingerprint.json":
                path.unlink()
        shutil.rmtree(self.folder)


class Follower:
    """What a process that does not write keeps of a journal that another one writes: its share of hidden states.

    It writes those behind a block before the other one counts the block, and keeps those before it.
    """

    def __init__(self, folder: Path, rank: int, done: int) -> None:
        self.folder, self.rank, self.done = folder, rank, done

    def _hidden(self, done: int) -> Path:
        return self.folder / f"hidden-{done:05d}-{self.rank}.safetensors"

    def write_block(self, block: int, hidden: Sequence[Entry]) -> None:
        """Keep the hidden states behind a block."""
        write_entries({f"{i:05d}": h for i, h in enumerate(hidden)}, self._hidden(block + 1), digest=True)
        self._hidden(block - 1).unlink(missing_ok=True)

    def hidden(self) -> Iterator[torch.Tensor]:
        """Those behind the last finished block. Raises ResourceError if they are damaged."""
        return _tensors(self._hidden(self.done))


def _stored(path: Path) -> dict[str, Entry]:
    try:
        check_digest(path)
        return stored(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _tensors(path: Path) -> Iterator[torch.Tensor]:
    for _, entry in sorted(_stored(path).items()):
        yield entry.load()


def _write_json(path: Path, value: Any) -> None:
    """A JSON value beside its checksum."""
    value = json.loads(json.dumps(value))  # with the keys that it will be read with
    digest = _digest(json.dumps(value, sort_keys=True))
    write_synced(path, json.dumps({"sha256": digest, "value": value}, sort_keys=True).encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if found["sha256"] != _digest(json.dumps(found["value"], sort_keys=True)):
            raise ValueError("its checksum is another one")
        return found["value"]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise _damaged(path, error) from error


def _read_stamp(path: Path) -> dict[str, Any]:
    """The fingerprint, also one that was left before files had checksums: its versions are others then."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    return found if isinstance(found, dict) and "versions" in found else _read_json(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, error: Exception) -> ResourceError:
    return ResourceError(f"{path}: damaged ({error}); --fresh starts over")


def save_synced(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with its checksum, whole or not at all."""
    write_entries({name: Entry.of(tensor) for name, tensor in tensors.items()}, path, digest=True)


def write_entries(entries: Mapping[str, Entry], path: Path, digest: bool = False) -> None:
    """Write tensors that are fetched one by one, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    write_tensors(aside, entries, digest)
    os.replace(aside, path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


def _difference(theirs: Any, ours: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty if they do not."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys([*ours, *theirs]):  # the recipe first, then what follows from it
            found = _difference(theirs.get(key), ours.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return ""
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return next((d for i, (a, b) in pairs if (d := _difference(a, b, f"{where}[{i}]"))), "")
    return "" if theirs == ours else f"{where}={_short(theirs)} (now {_short(ours)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}...{text[-8:]}"
