"""The innermost loops of the quadratic solvers, compiled where they can be: float32 on a CPU with a C compiler.

The torch loops in `obs` and `refine` serve everything else; the two differ by the rounding of sums alone.
Matrices are transposed here: one column of the weight is one contiguous row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from trifold.core.native import library
from trifold.core.ranges import to_codes
from trifold.core.scheme import Scheme


class NearestCode:
    """A decision for `obs.sweep`: the nearest code of each weight.

    group: for each column the row of scale and zero, (groups, rows) float32, that it uses. codes: (columns,
    rows) float32, filled in.
    """

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor, group: Sequence[int], scheme: Scheme) -> None:
        self.scale, self.zero, self.scheme = scale.contiguous(), zero.contiguous(), scheme
        self.group = torch.tensor(group, dtype=torch.int64)
        self.codes = scale.new_empty(len(group), scale.shape[1])
        self._places = list(zip((self.scale[g] for g in group), (self.zero[g] for g in group), self.codes, strict=True))

    def __call__(self, j: int, column: torch.Tensor) -> torch.Tensor:
        scale, zero, code = self._places[j]
        code.copy_(to_codes(column, scale, zero, self.scheme))
        return (code - zero).mul_(scale)

    def fix(self, start: int, current: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> bool:
        """Decide a block of columns at once; False where that has to be done one by one.

        current: (columns, rows), becomes the decided values. errors: (columns, rows), filled in. factor:
        (columns, columns), upper triangular.
        """
        codes = self.codes[start : start + len(current)]
        native = _native(current, errors, codes, factor, self.scale, self.zero)
        if native is None or self.scheme.table is not None:
            return False
        native.sweep_columns(
            *map(ctypes.c_size_t, current.shape),
            ctypes.c_float(self.scheme.max_code),
            *map(_pointer, (current, errors, codes, factor)),
            ctypes.c_size_t(factor.stride(0)),
            *map(_pointer, (self.group[start:], self.scale, self.zero)),
        )
        return True


def descend_block(
    codes: torch.Tensor,
    slopes: torch.Tensor,
    step: torch.Tensor,
    scale: torch.Tensor,
    moved: torch.Tensor,
    hessian: torch.Tensor,
    max_code: int,
) -> bool:
    """Coordinate descent over a block of columns, (columns, rows) each; False where it is not compiled.

    codes: becomes the better ones. moved: filled with the change of the weights. hessian: (columns, columns).
    """
    native = _native(codes, slopes, step, scale, moved, hessian)
    if native is None:
        return False
    native.descend_columns(
        *map(ctypes.c_size_t, codes.shape),
        ctypes.c_float(max_code),
        *map(_pointer, (codes, slopes, step, scale, moved, hessian)),
        ctypes.c_size_t(hessian.stride(0)),
    )
    return True


def _native(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    suits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.stride(-1) == 1 for t in tensors)
    return library("columns") if suits else None


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
