"""What the formats of `Sparse` tensors share: some rows can be read alone, and survivors lie in one stream.

Of a weight whose survivors are numbers as they are, the spec has a `dtype` and

    weight             dtype (survivors,)                              row by row

and of rounded ones the keys of `formats/quantized.py`, with `grid` and `zero_point` where they are not the default:

    weight             int32 (ceil(survivors * bits / 32),)            bitstream of codes, row by row
    weight_scale       scale_dtype, scheme.scale_shape
    weight_zero_point  int32 (ceil(scales * bits / 32),)               bitstream, row by row; integers
                       scale_dtype, scheme.scale_shape                 real ones

What `weight` has is one dimension, so that a loader without Trifold stops.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from trifold.core.canonical import Canonical, Dense, Quantized, Sparse
from trifold.core.scheme import SCALE_DTYPES
from trifold.formats.base import Format, Layout, Spec, label
from trifold.formats.bitstream import codes_at, pack_bits, unpack_range, words_for
from trifold.formats.quantized import group_label, scheme_of

Rows = slice | torch.Tensor
"""Rows of a weight: a slice with start and stop, or int64 indices (n,)."""

DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class SparseFormat(Format):
    """name: under which it is registered."""

    name: str

    @abstractmethod
    def rows(self, tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Sparse:
        """The canonical tensor of some rows alone."""

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Sparse:
        return self.rows(tensors, spec, slice(0, spec["shape"][0]))


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def values_spec(values: Canonical) -> Spec:
    """What a spec says of the survivors."""
    if isinstance(values, Dense):
        return {"dtype": DTYPE_NAMES[values.values.dtype]}
    assert isinstance(values, Quantized)
    scheme, own = values.scheme, dict[str, Any]()
    if scheme.grid != "int":
        own["grid"] = scheme.grid
    if scheme.zero_point != "integer":
        own["zero_point"] = scheme.zero_point
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "scale_dtype": scheme.scale_dtype,
        **own,
    }


def values_label(spec: Spec) -> str:
    """`bfloat16`, `int4 g128 asym` and so on."""
    if "dtype" in spec:
        return str(spec["dtype"])
    if spec.get("grid", "int") != "int":
        return f"{spec['grid']} {group_label(spec)}"
    return label({**spec, "format": "affine" if spec.get("zero_point") == "real" else "int"})


def values_layout(spec: Spec, survivors: int) -> Layout:
    """The stored tensors of the survivors."""
    if "dtype" in spec:
        return {"weight": ((survivors,), SCALE_DTYPES[spec["dtype"]])}
    scheme = scheme_of(spec)
    shape, dtype = scheme.scale_shape(*spec["shape"]), SCALE_DTYPES[scheme.scale_dtype]
    found: Layout = {
        "weight": ((words_for(survivors, scheme.bits),), torch.int32),
        "weight_scale": (shape, dtype),
    }
    if not scheme.symmetric:
        integer = ((words_for(shape[0] * shape[1], scheme.bits),), torch.int32)
        found["weight_zero_point"] = integer if scheme.zero_point == "integer" else (shape, dtype)
    return found


def pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes of any shape uint8 -> one bitstream, int32 (words,)."""
    return pack_bits(codes.reshape(1, -1), bits)[0]


def pack_values(canonical: Sparse) -> dict[str, torch.Tensor]:
    """The stored tensors of the survivors."""
    values, mask = canonical.values, canonical.mask
    if isinstance(values, Dense):
        return {"weight": values.values[mask]}
    assert isinstance(values, Quantized)
    tensors = {"weight": pack_stream(values.codes[mask], values.scheme.bits), "weight_scale": values.scale.contiguous()}
    if values.zero_point is not None:
        integer = values.scheme.zero_point == "integer"
        stored = pack_stream(values.zero_point, values.scheme.bits) if integer else values.zero_point.contiguous()
        tensors["weight_zero_point"] = stored
    return tensors


def read_stream(words: torch.Tensor, bits: int, rows: Rows, starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Codes of some rows of a stream, one row after the other. starts, counts: (n,) of each row."""
    if isinstance(rows, slice):
        return unpack_range(words, bits, int(starts[:1].sum()), int(counts.sum()))
    return codes_at(words, bits, places(starts, counts))


def places(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """starts[0], starts[0] + 1, ... counts[0] of them, then those of the next: int64."""
    before = counts.cumsum(0) - counts
    total = torch.arange(int(counts.sum()), device=starts.device)
    return torch.repeat_interleave(starts - before, counts) + total


def row_numbers(rows: Rows, device: torch.device) -> torch.Tensor:
    """int64 (n,)."""
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows


def read_values(
    tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows, mask: torch.Tensor, starts: torch.Tensor
) -> Canonical:
    """The survivors of some rows at their places, 0 elsewhere. mask: (n, in). starts: (n,), where each row begins."""
    counts, weight = mask.sum(1), tensors["weight"]
    if "dtype" in spec:
        values = weight.new_zeros(mask.shape)
        values[mask] = weight[places(starts, counts)]
        return Dense(values)
    scheme = scheme_of(spec)
    codes = torch.zeros(mask.shape, dtype=torch.uint8, device=weight.device)
    codes[mask] = read_stream(weight, scheme.bits, rows, starts, counts)
    at: Rows = slice(0, 1) if scheme.group_size == "tensor" else rows
    scale = tensors["weight_scale"][at]
    zero = tensors.get("weight_zero_point")
    if zero is not None and scheme.zero_point == "integer":
        numbers = row_numbers(at, zero.device)
        each = torch.full_like(numbers, scale.shape[1])
        zero = read_stream(zero, scheme.bits, at, numbers * scale.shape[1], each).reshape(scale.shape)
    elif zero is not None:
        zero = zero[at]
    return Quantized(codes, scale, zero, scheme)
