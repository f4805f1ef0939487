"""The innermost loops of the quadratic solvers, compiled where they can be: float32 on a CPU with a C compiler.

The torch loops in `obs` and `refine` serve everything else; the two differ by the rounding of sums alone.
Matrices are transposed here: one column of the weight is one contiguous row.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from trifold.core.native import library, pointer
from trifold.core.ranges import to_codes
from trifold.core.scheme import Scheme


class ColumnDecision(ABC):
    """A decision for `obs.sweep` that can settle a block of columns at once."""

    @abstractmethod
    def __call__(self, j: int, column: torch.Tensor) -> torch.Tensor:
        """What is kept of column j, (rows,)."""

    @abstractmethod
    def fix(self, start: int, current: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> bool:
        """Decide a block of columns at once; False where that has to be done one by one.

        current: (columns, rows), becomes the decided values. errors: (columns, rows), filled in. factor:
        (columns, columns), upper triangular.
        """


class NearestCode(ColumnDecision):
    """The nearest code of each weight.

    group: for each column the row of scale and zero, (groups, rows) float32, that it uses. keep: (columns, rows)
    float32, 0 where a weight becomes zero whatever its code, else 1; it may still change before a column's turn.
    codes: (columns, rows) float32, filled in.
    """

    def __init__(
        self,
        scale: torch.Tensor,
        zero: torch.Tensor,
        group: Sequence[int],
        scheme: Scheme,
        keep: torch.Tensor | None = None,
    ) -> None:
        self.scale, self.zero, self.scheme, self.keep = scale.contiguous(), zero.contiguous(), scheme, keep
        self.group = torch.tensor(group, dtype=torch.int64)
        self.codes = scale.new_empty(len(group), scale.shape[1])
        self._places = list(zip((self.scale[g] for g in group), (self.zero[g] for g in group), self.codes, strict=True))

    def __call__(self, j: int, column: torch.Tensor) -> torch.Tensor:
        scale, zero, code = self._places[j]
        code.copy_(to_codes(column, scale, zero, self.scheme))
        decided = (code - zero).mul_(scale)
        return decided if self.keep is None else decided.mul_(self.keep[j])

    def fix(self, start: int, current: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> bool:
        codes = self.codes[start : start + len(current)]
        keep = () if self.keep is None else (self.keep[start : start + len(current)],)
        native = _native(current, errors, codes, factor, self.scale, self.zero, *keep)
        if native is None or self.scheme.table is not None:
            return False
        native.sweep_columns(
            *map(ctypes.c_size_t, current.shape),
            ctypes.c_float(self.scheme.max_code),
            *map(pointer, (current, errors, codes, factor)),
            ctypes.c_size_t(factor.stride(0)),
            *map(pointer, (self.group[start:], self.scale, self.zero)),
            pointer(*keep) if keep else None,
        )
        return True


class Kept(ColumnDecision):
    """Weights as they are, or zero. keep: (columns, rows) float32, 1 or 0; as for `NearestCode`."""

    def __init__(self, keep: torch.Tensor) -> None:
        self.keep = keep

    def __call__(self, j: int, column: torch.Tensor) -> torch.Tensor:
        return column * self.keep[j]

    def fix(self, start: int, current: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> bool:
        keep = self.keep[start : start + len(current)]
        native = _native(current, errors, factor, keep)
        if native is None:
            return False
        native.mask_columns(
            *map(ctypes.c_size_t, current.shape),
            *map(pointer, (current, errors, keep, factor)),
            ctypes.c_size_t(factor.stride(0)),
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
        *map(pointer, (codes, slopes, step, scale, moved, hessian)),
        ctypes.c_size_t(hessian.stride(0)),
    )
    return True


def _native(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    suits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.stride(-1) == 1 for t in tensors)
    return library("columns") if suits else None
