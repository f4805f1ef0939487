"""Blocks of 32 weights, as llama.cpp stores them one after the other along each row.

    Q4_0  d, 16 bytes              w = (code - 8) d
    Q4_1  d, m, 16 bytes           w = code d + m
    Q5_0  d, 4 bytes, 16 bytes     w = (code - 16) d
    Q5_1  d, m, 4 bytes, 16 bytes  w = code d + m
    Q8_0  d, 32 bytes              w = signed code d

d and m are float16. Of the 16 bytes, number j has the lower four bits of code j in its lower half and those of code
j + 16 in its upper half; bit j of the 4 bytes is the fifth bit of code j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import Scheme
from trifold.ecosystem.base import by_row, inexact, not_integers, quantized, weights_only
from trifold.ecosystem.regrid import misfit, regrid

SIZE = 32  # weights of a block


@dataclass(frozen=True)
class Block:
    """name: of the type, as ggml has it. minimum: whether it stores m."""

    name: str
    bits: int
    minimum: bool = False

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, SIZE, not self.minimum, "float16")

    @property
    def nbytes(self) -> int:
        return 2 + 2 * self.minimum + self.bits * SIZE // 8

    def refusal(self, weight: Quantized) -> str | None:
        """Why it cannot hold a weight whose rows are whole blocks and whose scales are float16's."""
        why = misfit(weight, self.scheme)
        if why is not None or not self.minimum:
            return why
        scale, zero = by_row(weight)
        if zero is None:
            zero = torch.full_like(scale, weight.scheme.midpoint)
        lowest = zero.float() * scale.float()
        exact = torch.equal(lowest.half().float(), lowest)
        return None if exact else "its zero-points times their scales would be rounded to float16"

    def encode(self, weight: Quantized) -> torch.Tensor:
        """A weight (out, in) that is not refused -> (out, in / 32 * nbytes) uint8."""
        found = regrid(weight, self.scheme)
        rows = found.shape[0]
        parts = [_bytes(found.scale)]
        if found.zero_point is not None:
            parts.append(_bytes((-found.zero_point.float() * found.scale.float()).half()))
        codes = found.codes.reshape(rows, -1, SIZE)
        if self.bits == 8:
            parts.append(codes - 128)  # wraps around: two's complement
        else:
            if self.bits == 5:
                fifth = (codes >> 4).reshape(rows, -1, 4, 8)
                weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
                parts.append((fifth * weights).sum(-1, dtype=torch.uint8))
            low = codes & 15
            parts.append(low[..., :16] | low[..., 16:] << 4)
        return torch.cat(parts, dim=-1).reshape(rows, -1)

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """What the `gguf` package makes of the bytes: (out, in) float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[self.name]))


BLOCKS = (
    Block("Q4_0", 4),
    Block("Q4_1", 4, minimum=True),
    Block("Q5_0", 5),
    Block("Q5_1", 5, minimum=True),
    Block("Q8_0", 8),
)
"""The smallest first."""


def refusal(weight: Canonical) -> str | None:
    """Why no block holds the weight exactly. Looks at no code."""
    why = weights_only(weight) or not_integers(weight)
    if why is not None:
        return why
    found = quantized(weight)
    width, columns = found.scheme.group_width(found.shape[1]), found.shape[1]
    if columns % SIZE:
        return f"its {columns} inputs are not whole blocks of {SIZE}"
    if width != columns and width % SIZE:
        return f"groups of {width} inputs are not whole blocks of {SIZE}"
    return inexact(found.scale, torch.float16) or BLOCKS[-1].refusal(found)


def block_for(weights: Sequence[Canonical]) -> Block:
    """The smallest block that holds all of these, none of which `refusal` refuses."""
    found = [quantized(weight) for weight in weights]
    return next(block for block in BLOCKS if not any(block.refusal(weight) for weight in found))


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """(out, groups) float16 -> (out, groups, 2) uint8."""
    return values.contiguous().view(torch.uint8).reshape(*values.shape, 2)
