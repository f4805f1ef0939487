"""Writing and reading safetensors piece by piece, so that no copy of a file is ever in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_DIGEST, _UNKNOWN = b'"sha256":"', b"0" * 64


@dataclass(frozen=True)
class Entry:
    """A tensor that is somewhere: its shape and dtype, and how to get it when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors calls it."""
        return _NAMES[self.dtype]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Entry:
        """A tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def stored(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name. Raises SafetensorError or OSError if it cannot be read."""

    def load(name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as handle:
            return handle.get_tensor(name)

    def entry(name: str) -> Entry:
        part = handle.get_slice(name)
        return Entry(tuple(part.get_shape()), _DTYPES[part.get_dtype()], lambda: load(name))

    with safe_open(path, framework="pt") as handle:
        return {name: entry(name) for name in handle.keys()}  # noqa: SIM118 - not a dict


def _places(path: Path) -> dict[str, tuple[torch.dtype, int, int]]:
    """Name -> dtype, and where the bytes of the tensor begin and end in the file."""
    with open(path, "rb") as file:
        start = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (_DTYPES[entry["dtype"]], *(start + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
        if entry["dtype"] in _DTYPES
    }


def read_parts(path: Path, names: Iterable[str], size: int = 2**24) -> Iterator[tuple[str, torch.Tensor]]:
    """The elements of these tensors in flat parts of `size` bytes at most, valid until the next one is asked for.

    Mapped files stay in memory as long as they are open; this reads into one buffer. Raises OSError.
    """
    places, buffer = _places(path), bytearray(size)
    with open(path, "rb", buffering=0) as file:
        for name in names:
            dtype, start, end = places[name]
            file.seek(start)
            while start < end:
                read = file.readinto(memoryview(buffer)[: min(size, end - start)])
                if not read or read % dtype.itemsize:
                    raise OSError(errno.EIO, f"{name} ends too early", str(path))
                yield name, torch.frombuffer(buffer, dtype=dtype, count=read // dtype.itemsize)
                start += read


def read_ahead(path: Path, names: Iterable[str]) -> None:
    """Let the system read these tensors into its cache while something else is done."""
    if not hasattr(os, "posix_fadvise"):
        return
    places = _places(path)
    with open(path, "rb") as file:
        for name in names:
            _, start, end = places[name]
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)


def check_digest(path: Path, size: int = 2**20) -> None:
    """Raise ValueError or OSError unless the file is, to the bit, what `write_tensors` wrote with a digest."""
    with open(path, "rb") as file:
        head = file.read(8)
        text = file.read(min(int.from_bytes(head, "little"), path.stat().st_size))
        place = text.find(_DIGEST) + len(_DIGEST)
        found = hashlib.sha256(text[:place] + _UNKNOWN + text[place + len(_UNKNOWN) :])
        while part := file.read(size):
            found.update(part)
    if found.hexdigest().encode() != text[place : place + len(_UNKNOWN)]:
        raise ValueError("its checksum is another one")


def write_tensors(path: Path, entries: Mapping[str, Entry], digest: bool = False) -> None:
    """Write a safetensors file and sync it to disk. Wide dtypes come first, so that every tensor is aligned.

    digest: put the SHA-256 of everything but itself and the length of the header into the metadata.
    """
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | ({"sha256": _UNKNOWN.decode()} if digest else {})}
    offset = 0
    for name in names:
        entry = entries[name]
        end = offset + entry.nbytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    found = hashlib.sha256(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            flat = entries[name].load().detach().cpu().reshape(-1)
            if flat.stride(0) != 1:  # torch calls a single element contiguous whatever its stride
                flat = flat.clone(memory_format=torch.contiguous_format)
            if flat.numel():
                data = flat.view(torch.uint8).numpy().data
                file.write(data)
                if digest:
                    found.update(data)
        if digest:
            file.seek(8 + text.index(_DIGEST) + len(_DIGEST))
            file.write(found.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
