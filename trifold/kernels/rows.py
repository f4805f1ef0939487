"""Some rows of a packed weight, without unpacking the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from trifold.core.canonical import Canonical, Dense, LowRank, Quantized, Sparse
from trifold.formats.base import FORMATS, Spec, unpack
from trifold.formats.bitstream import unpack_bits
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import Rows, SparseFormat

ALIGNMENT = 64
_TILE = {"cpu": 2**19}  # elements of a dense tile: it stays in the second-level cache
_LARGE_TILE = 2**24


def row_blocks(out_features: int, in_features: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks, each start a multiple of ALIGNMENT, sized for the device."""
    wanted = _TILE.get(device.type, _LARGE_TILE) // max(in_features, 1)
    step = max(ALIGNMENT, wanted - wanted % ALIGNMENT)
    for start in range(0, out_features, step):
        yield start, min(start + step, out_features)


def zero_points(tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> torch.Tensor | None:
    """The zero-points of some rows, uint8 or real, (n, groups), or (1, 1) for a whole tensor; None if symmetric."""
    scheme = scheme_of(spec)
    if scheme.symmetric:
        return None
    words = tensors["weight_zero_point"]
    if scheme.group_size == "tensor":
        rows = slice(0, 1)
    if scheme.zero_point == "real":
        return words[rows]
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=words.device)
    bit = rows * scheme.bits
    word, shift = bit // 32, (bit % 32).unsqueeze(1)
    low = words[word].long() & 0xFFFFFFFF
    high = words[(word + 1).clamp(max=len(words) - 1)].long() & 0xFFFFFFFF
    return ((low >> shift | high << (32 - shift)) & scheme.max_code).to(torch.uint8)


def with_codes(codes: torch.Tensor, tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Quantized:
    """Codes (n, in) of some rows, with the scales and zero-points that belong to them."""
    scheme = scheme_of(spec)
    scale = tensors["weight_scale"]
    if scheme.group_size != "tensor":
        scale = scale[rows]
    return Quantized(codes, scale, zero_points(tensors, spec, rows), scheme)


def _bitstream_rows(tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Quantized:
    weight = tensors["weight"]
    words = weight[rows] if isinstance(rows, slice) else weight.index_select(0, rows)
    return with_codes(unpack_bits(words, spec["bits"], spec["shape"][1]), tensors, spec, rows)


def _fp8_rows(tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Quantized:
    octets = tensors["weight"].squeeze(-1).view(torch.uint8)
    return with_codes(octets[rows] if isinstance(rows, slice) else octets.index_select(0, rows), tensors, spec, rows)


def _dense_rows(tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Dense:
    return Dense(tensors["weight"].reshape(spec["shape"])[rows])


def _low_rank_rows(tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> LowRank:
    rank = spec["rank"]
    left, right = tensors["weight"].reshape(-1, rank), tensors["weight_right"].reshape(rank, -1)
    return LowRank(left[rows], right)


def _sparse_rows(tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Sparse:
    found = FORMATS.get(spec["format"])
    assert isinstance(found, SparseFormat)
    return found.rows(tensors, spec, rows)


DECODERS: dict[str, Callable[[Mapping[str, torch.Tensor], Spec, Rows], Canonical]] = {
    "int": _bitstream_rows,
    "affine": _bitstream_rows,
    "table": _bitstream_rows,
    "fp8": _fp8_rows,
    "dense": _dense_rows,
    "low_rank": _low_rank_rows,
    "bitmask": _sparse_rows,
    "sparse24": _sparse_rows,
    "group_sparse_int": _sparse_rows,
}
"""By format: the canonical tensor of some rows alone. A format without one is unpacked whole."""


def dequantize(canonical: Canonical, dtype: torch.dtype) -> torch.Tensor:
    """`canonical.dequantize()` rounded to `dtype`, bit for bit, with fewer temporaries where that can be.

    In the dtype of the scales the difference of two integer codes is exact and the product is rounded once, as it
    is when a float32 product is rounded. What is not a difference of codes takes the product in float32.
    """
    if not isinstance(canonical, Quantized) or canonical.shape[1] % canonical.scheme.group_width(canonical.shape[1]):
        return canonical.dequantize().to(dtype)
    rows, columns = canonical.shape
    scheme, scale, zero = canonical.scheme, canonical.scale, canonical.zero_point
    codes = canonical.codes.reshape(rows, -1, scheme.group_width(columns))
    integer = scheme.table is None and scheme.zero_point == "integer"
    compute = dtype if integer and dtype == scale.dtype else torch.float32
    if scheme.table is not None:
        weight = scheme.table.decode(codes)
    else:
        weight = codes.to(compute).sub_(scheme.midpoint if zero is None else zero.to(compute).unsqueeze(2))
    weight.mul_(scale.to(compute).unsqueeze(2))
    return weight.reshape(rows, columns).to(dtype)


def dequantize_rows(
    tensors: Mapping[str, torch.Tensor], spec: Spec, start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows start..stop-1 of the dequantised weight, (stop - start, in), rounded once to `dtype`."""
    decode = DECODERS.get(spec["format"])
    if decode is not None:
        return dequantize(decode(tensors, spec, slice(start, stop)), dtype)
    return unpack(tensors, spec).dequantize()[start:stop].to(dtype)
