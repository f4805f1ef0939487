"""Safetensors written tensor by tensor are what the library itself would read and write."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trifold.compress.tensor_file import Entry, stored, write_tensors

TENSORS = {
    "b": torch.arange(7, dtype=torch.uint8),
    "a": torch.tensor(3.5),
    "empty": torch.zeros(0, 5),
    "z": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "view": torch.arange(12.0).reshape(3, 4).T,
    "f8": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
    "long": torch.tensor([[2**40]]),
    "flag": torch.tensor([True, False, True]),
    "strided": torch.arange(16, dtype=torch.int32).reshape(2, 8)[:1, :1],
}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).equal(b.contiguous().view(-1))


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path / "x", {name: Entry.of(tensor) for name, tensor in TENSORS.items()})
    read = load_file(tmp_path / "x")
    assert read.keys() == TENSORS.keys() and all(same(read[name], TENSORS[name]) for name in read)


def header(path):
    """The JSON of a file, and the size of what follows."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0  # so that the tensors behind it are aligned
    return json.loads(data[8 : 8 + size]), len(data) - 8 - size


def test_the_header_is_that_of_the_library(tmp_path):
    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(plain, tmp_path / "library", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", {name: Entry.of(tensor) for name, tensor in reversed(plain.items())})
    (theirs, their_size), (ours, our_size) = (header(tmp_path / name) for name in ("library", "ours"))
    assert ours.pop("__metadata__") == theirs.pop("__metadata__") and our_size == their_size
    assert {name: (e["dtype"], e["shape"]) for name, e in ours.items()} == {
        name: (e["dtype"], e["shape"]) for name, e in theirs.items()
    }
    for name, entry in ours.items():
        assert entry["data_offsets"][0] % TENSORS[name].dtype.itemsize == 0


def test_a_tensor_is_read_only_when_it_is_written(tmp_path):
    write_tensors(tmp_path / "x", {name: Entry.of(tensor) for name, tensor in TENSORS.items()})
    entries = stored(tmp_path / "x")
    assert {name: (entry.shape, entry.dtype) for name, entry in entries.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    assert all(entry.nbytes == TENSORS[name].nbytes for name, entry in entries.items())
    held = []

    def counted(name):
        def load():
            held.append(name)
            return entries[name].load()

        return load

    write_tensors(tmp_path / "y", {n: Entry(e.shape, e.dtype, counted(n)) for n, e in entries.items()})
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes() and sorted(held) == sorted(TENSORS)


def test_a_damaged_file(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff" * 20)
    with pytest.raises(SafetensorError):
        stored(tmp_path / "x")
