"""`group_sparse_int`: groups of integers that share a scale, those that are dropped left out.

    weight             int32 (ceil(groups * group_size * bits / 32),)  bitstream of codes, group after group
    weight_row_start   int32 (out + 1,)                                where the groups of each row begin
    weight_column      uint8 or int16 (groups,)                        which group of its row, ascending within a row
    weight_scale       scale_dtype (groups,)
    weight_zero_point  int32 (ceil(groups * bits / 32),)               bitstream; asymmetric only

With `scale_bits: 8` scales have two levels, and stand for scale * row scale in float32:

    weight_scale       uint8 (groups,)
    weight_row_scale   bfloat16 (out,)

`groups`, in the spec, counts those that stay. A shorter last group of a row is filled with zero codes. Columns are
bytes where a row has at most 256 groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Quantized, Sparse
from trifold.core.errors import InputError
from trifold.core.ranges import expand_groups
from trifold.core.row_scales import from_row_scales
from trifold.core.scheme import SCALE_DTYPES
from trifold.formats.base import FORMATS, Layout, Spec
from trifold.formats.bitmask import starts_of
from trifold.formats.bitstream import words_for
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import (
    Rows,
    SparseFormat,
    pack_stream,
    percent,
    places,
    read_stream,
    values_label,
    values_spec,
)

MOST_GROUPS = 2**15


def groups_in_row(spec: Spec) -> int:
    """Groups of one row, dropped ones among them."""
    return -(-spec["shape"][1] // spec["group_size"])


def _two_levels(values: Quantized, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes (out, groups) and row scales (out,), if float32 scales have that form."""
    known = values.scale.dtype == torch.float32 and not values.scale.is_meta
    return from_row_scales(values.scale, kept) if known else None


class GroupSparseFormat(SparseFormat):
    name = "group_sparse_int"

    def holds(self, canonical: Canonical) -> bool:
        if not isinstance(canonical, Sparse) or not isinstance(canonical.values, Quantized):
            return False
        scheme = canonical.values.scheme
        integer = scheme.grid == "int" and scheme.zero_point == "integer" and isinstance(scheme.group_size, int)
        return integer and canonical.pattern == f"1x{scheme.group_size}"

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Sparse) and isinstance(canonical.values, Quantized)
        spec = {"format": "group_sparse_int", "shape": list(canonical.shape), **values_spec(canonical.values)}
        kept = canonical.mask[:, :: spec["group_size"]]
        levels = {"scale_bits": 8} if _two_levels(canonical.values, kept) is not None else {}
        return spec | levels | {"groups": int(kept.count_nonzero())}

    def label(self, spec: Spec) -> str:
        share = 1 - spec["groups"] / (spec["shape"][0] * groups_in_row(spec))
        scales = ", 8-bit scales" if spec.get("scale_bits") else ""
        return f"{values_label(spec)}{scales}, {percent(share)} of groups dropped"

    def layout(self, spec: Spec) -> Layout:
        (rows, columns), groups, scheme = spec["shape"], spec["groups"], scheme_of(spec)
        if groups_in_row(spec) > MOST_GROUPS:
            raise InputError(
                f"format group_sparse_int holds rows of {MOST_GROUPS} groups at most, not in_features={columns} with "
                f"group_size={spec['group_size']}; use a larger group_size"
            )
        found: Layout = {
            "weight": ((words_for(groups * spec["group_size"], scheme.bits),), torch.int32),
            "weight_row_start": ((rows + 1,), torch.int32),
            "weight_column": ((groups,), torch.uint8 if groups_in_row(spec) <= 256 else torch.int16),
            "weight_scale": ((groups,), SCALE_DTYPES[scheme.scale_dtype]),
        }
        if spec.get("scale_bits"):
            found["weight_scale"] = ((groups,), torch.uint8)
            found["weight_row_scale"] = ((rows,), torch.bfloat16)
        if not scheme.symmetric:
            found["weight_zero_point"] = ((words_for(groups, scheme.bits),), torch.int32)
        return found

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Sparse) and isinstance(canonical.values, Quantized)
        values, size = canonical.values, canonical.values.scheme.group_size
        assert isinstance(size, int)
        bits, kept = values.scheme.bits, canonical.mask[:, ::size]
        codes = torch.nn.functional.pad(values.codes, (0, -values.codes.shape[1] % size)).unflatten(1, (-1, size))
        tensors = {
            "weight": pack_stream(codes[kept], bits),
            "weight_row_start": starts_of(kept.sum(1)),
            "weight_column": kept.nonzero()[:, 1].to(torch.uint8 if kept.shape[1] <= 256 else torch.int16),
            "weight_scale": values.scale[kept],
        }
        if (levels := _two_levels(values, kept)) is not None:
            tensors["weight_scale"], tensors["weight_row_scale"] = levels[0][kept], levels[1]
        if values.zero_point is not None:
            tensors["weight_zero_point"] = pack_stream(values.zero_point[kept], bits)
        return tensors

    def rows(self, tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Sparse:
        scheme, size, width, columns = scheme_of(spec), spec["group_size"], groups_in_row(spec), spec["shape"][1]
        begin, end = (part[rows].long() for part in (tensors["weight_row_start"][:-1], tensors["weight_row_start"][1:]))
        counts = end - begin
        stored = places(begin, counts)  # of the groups of these rows
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        at = row, tensors["weight_column"][stored].long()
        scale = torch.ones(len(counts), width, dtype=SCALE_DTYPES[scheme.scale_dtype], device=counts.device)
        if spec.get("scale_bits"):
            scale[at] = tensors["weight_scale"][stored].float() * tensors["weight_row_scale"][rows].float()[row]
        else:
            scale[at] = tensors["weight_scale"][stored]
        kept = torch.zeros(scale.shape, dtype=torch.bool, device=counts.device)
        kept[at] = True
        codes = torch.zeros(len(counts), width, size, dtype=torch.uint8, device=counts.device)
        codes[at] = read_stream(tensors["weight"], scheme.bits, rows, begin * size, counts * size).reshape(-1, size)
        zero = None
        if not scheme.symmetric:
            zero = torch.zeros(scale.shape, dtype=torch.uint8, device=counts.device)
            zero[at] = read_stream(tensors["weight_zero_point"], scheme.bits, rows, begin, counts)
        values = Quantized(codes.flatten(1)[:, :columns].contiguous(), scale, zero, scheme)
        return Sparse(values, expand_groups(kept, (len(counts), columns), size).contiguous(), f"1x{size}")


FORMATS.register("group_sparse_int")(GroupSparseFormat())
