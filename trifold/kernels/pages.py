"""Memory that a tensor of a mapped file has in this process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch

_PAGEOUT = 21  # MADV_PAGEOUT


def page_out(tensor: torch.Tensor) -> None:
    """Let the pages of a mapped checkpoint leave the process; whoever reads them again gets them from the file.

    For a tensor that was read and is not needed for now. Nothing is lost: pages that were changed stay where they are
    (MADV_PAGEOUT of Linux 5.4; elsewhere, and for tensors of torch's own allocator, nothing happens).
    """
    storage = tensor.untyped_storage()
    if sys.platform != "linux" or tensor.device.type != "cpu" or storage.resizable():
        return
    page, start = mmap.PAGESIZE, storage.data_ptr()
    first, last = -(-start // page) * page, (start + storage.nbytes()) // page * page
    if first < last:
        _madvise()(first, last - first, _PAGEOUT)


def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
