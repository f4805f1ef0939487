"""`int`: uniform integers of 1..8 bits with scales and, if they are not symmetric, integer zero-points.

    weight_zero_point  int32 (ceil(rows * bits / 32), groups)  bitstream down each column; asymmetric only

`rows` is the number of rows of the scales; see `formats/quantized.py` for codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import Scheme
from trifold.formats.base import FORMATS, Layout, Spec
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for
from trifold.formats.quantized import QuantizedFormat, group_label


class IntFormat(QuantizedFormat):
    name = "int"

    def stores(self, scheme: Scheme) -> bool:
        return scheme.grid == "int" and scheme.zero_point == "integer"

    def label(self, spec: Spec) -> str:
        return f"int{spec['bits']} {group_label(spec)} {'sym' if spec['symmetric'] else 'asym'}"

    def layout(self, spec: Spec) -> Layout:
        layout = super().layout(spec)
        if not spec["symmetric"]:
            (rows, groups), _ = layout["weight_scale"]
            layout["weight_zero_point"] = ((words_for(rows, spec["bits"]), groups), torch.int32)
        return layout

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Quantized)
        tensors = super().pack(canonical)
        if canonical.zero_point is not None:
            tensors["weight_zero_point"] = pack_bits(canonical.zero_point.T, canonical.scheme.bits).T.contiguous()
        return tensors

    def zero_point(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> torch.Tensor | None:
        if spec["symmetric"]:
            return None
        rows = len(tensors["weight_scale"])
        return unpack_bits(tensors["weight_zero_point"].T.contiguous(), spec["bits"], rows).T.contiguous()


FORMATS.register("int")(IntFormat())
