"""Schemes: which numbers a weight may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trifold.core.errors import RecipeError, unknown_name
from trifold.core.tables import TABLES, Table

ScaleDtype = Literal["bfloat16", "float16", "float32"]
ZeroPoint = Literal["integer", "real"]
SCALE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Scheme:
    """Which values a weight may take, and what shares a scale.

    `grid="int"`: uniform integers of 1..8 bits, `value = (code - zero_point) * scale`. Codes are unsigned,
    `0 <= code < 2**bits`. With `symmetric` no zero-point is stored: it is `2**(bits-1)`, and for one bit the
    midpoint 0.5, so that the two levels are `-scale/2` and `+scale/2`. Otherwise `zero_point` says what it is:
    an "integer", a code, or "real", a number of `scale_dtype`.
    Any other grid is a table, `value = table[code] * scale` (see `core/tables.py`): `bits` has to be the table's,
    and `symmetric` becomes true, since there is no zero-point.
    `group_size` counts consecutive input features of one row that share a scale; the last group of a row may
    be shorter. `"channel"` is one scale per row, `"tensor"` one for the whole matrix.

    Raises RecipeError for an impossible value.
    """

    bits: int = 4
    group_size: int | Literal["channel", "tensor"] = 128
    symmetric: bool = False
    scale_dtype: ScaleDtype = "bfloat16"
    grid: str = "int"
    zero_point: ZeroPoint = "integer"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"bits={self.bits} is outside 1..8; 4 is usual, 16 means: leave the layer out")
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise RecipeError(f"group_size={self.group_size} is below 1; use 32, 64, 128, 'channel' or 'tensor'")
        if isinstance(self.group_size, str) and self.group_size not in ("channel", "tensor"):
            raise RecipeError(f"group_size={self.group_size!r} is neither a number, 'channel' nor 'tensor'")
        if self.scale_dtype not in SCALE_DTYPES:
            raise RecipeError(f"scale_dtype={self.scale_dtype!r} is not one of {', '.join(SCALE_DTYPES)}")
        if self.zero_point not in ("integer", "real"):
            raise RecipeError(f"zero_point={self.zero_point!r} is neither 'integer' nor 'real'")
        if self.grid != "int":
            if self.grid not in TABLES:
                raise RecipeError(unknown_name("grid", self.grid, ["int", *TABLES]))
            if self.bits != TABLES.get(self.grid).bits:
                raise RecipeError(f"grid={self.grid!r} has {TABLES.get(self.grid).bits} bits, not bits={self.bits}")
            object.__setattr__(self, "symmetric", True)
        if self.symmetric and self.zero_point != "integer":
            why = f"grid={self.grid!r}" if self.grid != "int" else "symmetric=true"
            raise RecipeError(f"zero_point={self.zero_point!r}: with {why} there is none; leave it out")

    @property
    def table(self) -> Table | None:
        """The values by code, None for uniform integers."""
        return None if self.grid == "int" else TABLES.get(self.grid)

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def midpoint(self) -> float:
        """The implied zero-point of a symmetric scheme; 0 for a table."""
        if self.grid != "int":
            return 0.0
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def group_width(self, in_features: int) -> int:
        """Input features that share a scale."""
        return min(self.group_size, in_features) if isinstance(self.group_size, int) else in_features

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales (and zero-points) of an (out, in) weight."""
        if self.group_size == "tensor":
            return (1, 1)
        return (out_features, -(-in_features // self.group_width(in_features)))
