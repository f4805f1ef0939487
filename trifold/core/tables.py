"""Grids that are not uniform: a code is a place in a table of values, and `value = table[code] * scale`.

- `nf4`: the 16 quantiles of a normal distribution of QLoRA, in -1..1. Dettmers et al. 2023, arXiv 2305.14314.
- `fp4_e2m1`: the 4-bit float of the OCP microscaling formats, in -6..6.
- `fp8_e4m3`: the 8-bit float without infinities, in -448..448; a code is the byte of `torch.float8_e4m3fn`.
  Micikevicius et al. 2022, arXiv 2209.05433.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from trifold.core.registry import Registry


@dataclass(frozen=True, eq=False)
class Table:
    """values: by code, NaN where a code stands for no number.

    even: a number halfway between two values goes to the one with the even code, as IEEE 754 rounds; else to the
    lower value, as QLoRA does. dtype: torch's own type of these numbers, whose cast is then what rounds.
    """

    bits: int
    values: tuple[float, ...]
    even: bool = True
    dtype: torch.dtype | None = None

    @cached_property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(value) for value in self.values if not math.isnan(value))

    def snap(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest value of each element of x, which is finite, in float32; beyond the ends, the end."""
        if self.dtype is not None:
            return x.clamp(-self.largest, self.largest).to(self.dtype).float()
        levels, _, bounds = _ascending(self, x.device)
        return levels[torch.bucketize(x.contiguous(), bounds)]

    def encode(self, levels: torch.Tensor) -> torch.Tensor:
        """Codes, uint8, of values of the table. Of two codes of one value, +0 and -0, the lower one is taken, but
        with a `dtype` the one of the same sign."""
        if self.dtype is not None:
            return levels.to(self.dtype).view(torch.uint8)
        _, codes, bounds = _ascending(self, levels.device)
        return codes[torch.bucketize(levels.contiguous(), bounds)]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values, float32, of codes uint8 of any shape."""
        values = _by_code(self, codes.device)
        return values.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


@lru_cache(maxsize=32)
def _by_code(table: Table, device: torch.device) -> torch.Tensor:
    return torch.tensor(table.values, dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def _ascending(table: Table, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values float32 in ascending order, their codes uint8, and the largest number that belongs to each but the
    last: the midpoint, or the number just below it where the midpoint belongs to the next."""
    code_of: dict[float, int] = {}
    for code, value in enumerate(table.values):
        if not math.isnan(value):
            code_of.setdefault(value, code)
    values = torch.tensor(sorted(code_of), dtype=torch.float32)
    codes = torch.tensor([code_of[value] for value in sorted(code_of)], dtype=torch.uint8)
    middle = ((values[:-1].double() + values[1:].double()) / 2).float()
    if table.even:
        below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        middle = torch.where(codes[1:] % 2 == 0, below, middle)
    return values.to(device), codes.to(device), middle.to(device)


def _float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a small float: sign, exponent, mantissa from the top; subnormals; no infinities."""
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    fraction = mantissa / (1 << mantissa_bits)
    value = math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias)
    return -value if code >> exponent_bits + mantissa_bits else value


_E4M3 = tuple(math.nan if code & 127 == 127 else _float(code, 4, 3) for code in range(256))
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

TABLES: Registry[Table] = Registry("grid")
"""By the name that a recipe and a checkpoint call them by; `int`, the uniform grid, is none."""
TABLES.register("nf4")(Table(4, _NF4, even=False))
TABLES.register("fp4_e2m1")(Table(4, tuple(_float(code, 2, 1) for code in range(16))))
TABLES.register("fp8_e4m3")(Table(8, _E4M3, dtype=torch.float8_e4m3fn))
