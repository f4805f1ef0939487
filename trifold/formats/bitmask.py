"""`bitmask`: one bit for each weight says whether it is stored; any pattern, survivors rounded or not.

    weight_mask       int32 (out, ceil(in / 32))  a bit for each weight, 1 where it stays; bitstream along each row
    weight_row_start  int32 (out + 1,)            where the survivors of each row begin, and of the last end

Its spec has the `pattern` and the number of `survivors`; see `formats/sparse.py` for the survivors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Dense, Quantized, Sparse
from trifold.formats.base import FORMATS, Layout, Spec
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for
from trifold.formats.sparse import (
    DTYPE_NAMES,
    Rows,
    SparseFormat,
    pack_values,
    percent,
    read_values,
    values_label,
    values_layout,
    values_spec,
)


def starts_of(counts: torch.Tensor) -> torch.Tensor:
    """Survivors (or groups) of each row -> where each row begins, int32 (rows + 1,)."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


class BitmaskFormat(SparseFormat):
    name = "bitmask"
    last_resort = True

    def holds(self, canonical: Canonical) -> bool:
        if not isinstance(canonical, Sparse):
            return False
        values = canonical.values
        return isinstance(values, Quantized) or (isinstance(values, Dense) and values.values.dtype in DTYPE_NAMES)

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Sparse)
        return {
            "format": "bitmask",
            "shape": list(canonical.shape),
            "pattern": canonical.pattern,
            "survivors": int(canonical.mask.count_nonzero()),
            **values_spec(canonical.values),
        }

    def label(self, spec: Spec) -> str:
        rows, columns = spec["shape"]
        free = "" if spec["pattern"] == "unstructured" else f" {spec['pattern']}"
        return f"{percent(1 - spec['survivors'] / (rows * columns))} zeros{free} {values_label(spec)}"

    def layout(self, spec: Spec) -> Layout:
        rows, columns = spec["shape"]
        return {
            **values_layout(spec, spec["survivors"]),
            "weight_mask": ((rows, words_for(columns, 1)), torch.int32),
            "weight_row_start": ((rows + 1,), torch.int32),
        }

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Sparse)
        return {
            **pack_values(canonical),
            "weight_mask": pack_bits(canonical.mask.to(torch.uint8), 1),
            "weight_row_start": starts_of(canonical.mask.sum(1)),
        }

    def rows(self, tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Sparse:
        mask = unpack_bits(tensors["weight_mask"][rows], 1, spec["shape"][1]).bool()
        starts = tensors["weight_row_start"][:-1][rows].long()
        return Sparse(read_values(tensors, spec, rows, mask, starts), mask, spec["pattern"])


FORMATS.register("bitmask")(BitmaskFormat())
