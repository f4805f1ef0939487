"""Columns of a matrix to their places in a wider one: torch's own ways take as long as the products around them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trifold.core.native import NotCompiledError, compiled

_SOURCE = Path(__file__).parent / "place.c"
_FEW = 2**16  # numbers that one thread places


def place(from_: torch.Tensor, places: torch.Tensor, to: torch.Tensor) -> None:
    """to[:, places] = from_. from_: (M, n). places: (n,) int64, all different. to: (M, rows), contiguous, of the same
    dtype. Both on one device."""
    call = _function(from_.element_size()) if from_.device.type == "cpu" else None
    if call is None or torch.compiler.is_compiling():
        to.index_copy_(1, places, from_)
        return
    from_ = from_.contiguous()
    rows, width = from_.shape
    threads = min(torch.get_num_threads(), 1 + rows * width // _FEW)
    call(from_.data_ptr(), width, places.data_ptr(), to.data_ptr(), to.shape[1], rows, threads)


@cache
def _function(size: int) -> Callable[..., Any] | None:
    """For elements of so many bytes; None where it cannot be had."""
    if size not in (2, 4):
        return None
    try:
        library = compiled(_SOURCE, ("-fopenmp",))
    except NotCompiledError:
        try:
            library = compiled(_SOURCE, ())
        except NotCompiledError:
            return None
    function = library[f"place{size}"]
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    function.restype = None
    return function
