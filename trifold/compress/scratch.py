"""Tensors that lie side by side in one piece: of memory, or of a file of which only what is in use is in memory.

The file has no name, so that nothing is left of it when the process ends, however it ends. Its space is taken
when it is made: a full disk is an error then, and not a signal in the middle of a product.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from trifold.core.method import Statistics

_WORTH_A_FILE = 2**20  # bytes of a statistic

Release = Callable[[torch.Tensor], None]


def keep(_tensor: torch.Tensor) -> None:
    """A `Release` of what is in memory anyway."""


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> tuple[torch.Tensor, mmap.mmap]:
    """A tensor of zeros in a file without a name, and its pages. Raises OSError if the disk has no room for it."""
    size = max(math.prod(shape) * dtype.itemsize, 1)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        pages = mmap.mmap(file.fileno(), size)
    if not math.prod(shape):
        return torch.zeros(tuple(shape), dtype=dtype), pages
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(*shape), pages


def _forget(pages: mmap.mmap, start: int = 0, stop: int | None = None) -> None:
    """Take pages out of memory; the file keeps what they hold."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start -= start % mmap.PAGESIZE
        pages.madvise(mmap.MADV_DONTNEED, start, (len(pages) if stop is None else stop) - start)


class Slab:
    """Copies of tensors of one dtype, added one after the other until it is full.

    elements: of all together. folder: where its file is; None means memory. parts: the copies.
    """

    def __init__(
        self, elements: int, dtype: torch.dtype, device: torch.device | str = "cpu", folder: Path | None = None
    ) -> None:
        self.parts: list[torch.Tensor] = []
        self._used, self._pages = 0, None
        if folder is None:
            self._flat = torch.empty(elements, dtype=dtype, device=device)
        else:
            self._flat, self._pages = mapped((elements,), dtype, folder)

    def add(self, tensor: torch.Tensor) -> None:
        """Copy a tensor behind the ones before it. What does not fit, or has another dtype, is kept as it is."""
        end = self._used + tensor.numel()
        if end > len(self._flat) or tensor.dtype != self._flat.dtype:
            self.parts.append(tensor.clone())
            return
        part = self._flat[self._used : end].view(tensor.shape)
        self.parts.append(part.copy_(tensor))
        self._used = end
        self.release(part)

    def release(self, tensor: torch.Tensor) -> None:
        """This part is not needed for a while: let its pages go to the file."""
        if self._pages is not None and tensor.untyped_storage().data_ptr() == self._flat.data_ptr():
            start = int(tensor.storage_offset()) * tensor.itemsize
            _forget(self._pages, start, start + tensor.nbytes)


def spill(statistics: Statistics, folder: Path) -> None:
    """Move what statistics hold to files."""
    for statistic in statistics:
        for name, value in vars(statistic).items():
            if isinstance(value, torch.Tensor) and value.nbytes >= _WORTH_A_FILE and value.device.type == "cpu":
                copy, pages = mapped(value.shape, value.dtype, folder)
                setattr(statistic, name, copy.copy_(value))
                _forget(pages)
