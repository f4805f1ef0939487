"""The search for ranges, compiled where it can be: float32 on a CPU with a C compiler, integer grids.

Rows are independent, so threads share them out and the result does not depend on how many there are.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch

from trifold.core.native import library, pointer
from trifold.core.scheme import SCALE_DTYPES, Scheme

_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}
_WORTH_A_THREAD = 2**20  # elements


def search_ranges(
    weight: torch.Tensor, width: int, cost: torch.Tensor, factors: list[float], norm: float, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """For each group of `width` weights the factor on its extremes with the least `sum cost * |error|**norm`.

    weight: (rows, in) float32. cost: (in,). Returns scale and zero-point, (rows, groups) float32 as stored (None
    for a symmetric scheme); None where the search is not compiled.
    """
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32 and scheme.grid == "int"
    native = library("ranges") if suits and scheme.zero_point == "integer" else None
    if native is None:
        return None
    weight, cost = weight.contiguous(), cost.contiguous().float()
    rows, columns = weight.shape
    scale = weight.new_empty(rows, -(-columns // width))
    zero = None if scheme.symmetric else torch.empty_like(scale)
    candidates = torch.tensor(factors, dtype=torch.float32)
    limits = torch.finfo(SCALE_DTYPES[scheme.scale_dtype])
    levels = max(2 ** (scheme.bits - 1) - 1, 0.5) if scheme.symmetric else -1.0

    def search(part: slice) -> None:
        native.search_ranges(
            *map(ctypes.c_size_t, (part.stop - part.start, columns, width)),
            pointer(weight[part]),
            pointer(cost),
            ctypes.c_float(norm),
            ctypes.c_size_t(len(candidates)),
            pointer(candidates),
            *map(ctypes.c_float, (scheme.max_code, scheme.midpoint, levels)),
            ctypes.c_int(_KINDS[scheme.scale_dtype]),
            *map(ctypes.c_float, (limits.tiny, limits.max)),
            pointer(scale[part]),
            ctypes.c_void_p(None) if zero is None else pointer(zero[part]),
        )

    threads = max(1, min(torch.get_num_threads(), weight.numel() // _WORTH_A_THREAD, rows))
    share = -(-rows // threads)
    parts = [slice(start, min(start + share, rows)) for start in range(0, rows, share)]
    if len(parts) == 1:
        search(parts[0])
        return scale, zero
    with ThreadPoolExecutor(len(parts) - 1) as pool:
        others = [pool.submit(search, part) for part in parts[1:]]
        search(parts[0])
        for other in others:
            other.result()
    return scale, zero
