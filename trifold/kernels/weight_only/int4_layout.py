"""The weight layout of torch's int4 product on CPUs, and its inverse, found by asking the packer.

`aten::_convert_weight_to_int4pack_for_cpu` shuffles the codes in a way that depends on the processor. The
inverse needs no knowledge of it: the packer is given codes that spell, four bits at a time, the place they
come from. Packing goes by chunks of 64 rows, so that the table of places is small and no int32 copy of a
whole weight exists.
"""

from __future__ import annotations

from functools import lru_cache

import torch

CHUNK = 64
"""Rows packed at once; `packs_by_chunks` checks that a weight packed so is what the product wants."""


def _convert(codes: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    flat = packed.reshape(-1)
    return torch.cat([flat & 15, flat >> 4])


@lru_cache(maxsize=32)
def _places(rows: int, columns: int) -> torch.Tensor:
    """int32 (rows * columns,): where in the packed nibbles each code of a chunk lies."""
    index = torch.arange(rows * columns, device="cpu")
    origin = torch.zeros_like(index)
    for shift in range(0, int(index[-1]).bit_length(), 4):
        digits = _nibbles(_convert((index >> shift & 15).reshape(rows, columns)))
        origin |= digits.long() << shift
    places = torch.empty_like(index, dtype=torch.int32)
    places[origin] = index.to(torch.int32)
    return places


def pack(codes: torch.Tensor) -> torch.Tensor:
    """codes (out, in) uint8 below 16 -> uint8 (out, in / 2). out must be a multiple of 16, in of 2."""
    packed = codes.new_empty(codes.shape[0], codes.shape[1] // 2)
    for start in range(0, len(codes), CHUNK):
        packed[start : start + CHUNK] = _convert(codes[start : start + CHUNK])
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse, also for a slice of rows that starts at a multiple of CHUNK."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes = packed.new_empty(rows, columns)
    for start in range(0, rows, CHUNK):
        chunk = packed[start : start + CHUNK]
        places = _places(len(chunk), columns)
        codes[start : start + CHUNK] = _nibbles(chunk).index_select(0, places).reshape(-1, columns)
    return codes


@lru_cache(maxsize=1)
def packs_by_chunks() -> bool:
    """Whether packing by chunks gives what packing at once does, and the inverse is one, on this machine."""
    codes = torch.arange(176 * 32, device="cpu").mul(2654435761).remainder(2**32).div(2**28, rounding_mode="floor")
    codes = codes.to(torch.uint8).reshape(176, 32)
    packed = pack(codes)
    return torch.equal(packed, _convert(codes)) and torch.equal(unpack(packed), codes)
