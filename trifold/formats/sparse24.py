"""`sparse24`: two of every four consecutive weights, and which two.

    weight_index  int32 (out, ceil(in / 32))  four bits for each four weights, bitstream along each row: the place of
                                              the first survivor, and four times that of the second

These are the codes of the sparse tensor cores (as in CUTLASS), in the plain order of the weights; a kernel brings
them into its own. Each row has in / 2 survivors; see `formats/sparse.py` for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Sparse
from trifold.core.errors import InputError
from trifold.formats.base import FORMATS, Layout, Spec
from trifold.formats.bitmask import BitmaskFormat
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for
from trifold.formats.sparse import (
    Rows,
    SparseFormat,
    pack_values,
    read_values,
    row_numbers,
    values_label,
    values_layout,
    values_spec,
)


def index_of(mask: torch.Tensor) -> torch.Tensor:
    """mask (rows, in) bool with two in every four -> (rows, in / 4) uint8 codes."""
    found = torch.argsort((~mask).unflatten(1, (-1, 4)).to(torch.uint8), dim=-1, stable=True)
    return (found[..., 0] | found[..., 1] << 2).to(torch.uint8)


def mask_of(index: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    kept = torch.stack([index & 3, index >> 2], dim=-1).long()
    return torch.zeros(*index.shape, 4, dtype=torch.bool, device=index.device).scatter_(-1, kept, True).flatten(1)


class Sparse24Format(SparseFormat):
    name = "sparse24"

    def holds(self, canonical: Canonical) -> bool:
        """A weight with fewer than two in some four goes to the bitmask."""
        if not BitmaskFormat().holds(canonical):
            return False
        assert isinstance(canonical, Sparse)
        if canonical.pattern != "2:4" or canonical.shape[1] % 4:
            return False
        return 2 * int(canonical.mask.count_nonzero()) == canonical.mask.numel()  # none of the fours has more

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Sparse)
        return {"format": "sparse24", "shape": list(canonical.shape), **values_spec(canonical.values)}

    def label(self, spec: Spec) -> str:
        return f"2:4 {values_label(spec)}"

    def layout(self, spec: Spec) -> Layout:
        rows, columns = spec["shape"]
        if columns % 4:
            raise InputError(f"format sparse24 holds rows of whole fours, not of {columns}; bitmask holds any")
        index = ((rows, words_for(columns // 4, 4)), torch.int32)
        return {**values_layout(spec, rows * columns // 2), "weight_index": index}

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Sparse)
        return {**pack_values(canonical), "weight_index": pack_bits(index_of(canonical.mask), 4)}

    def rows(self, tensors: Mapping[str, torch.Tensor], spec: Spec, rows: Rows) -> Sparse:
        columns = spec["shape"][1]
        mask = mask_of(unpack_bits(tensors["weight_index"][rows], 4, columns // 4))
        starts = row_numbers(rows, mask.device) * (columns // 2)
        return Sparse(read_values(tensors, spec, rows, mask, starts), mask, "2:4")


FORMATS.register("sparse24")(Sparse24Format())
