"""`fp8`: 8-bit floats as safetensors has them, with scales.

    weight        float8_e4m3fn (out, in, 1)
    weight_scale  scale_dtype, scheme.scale_shape

The last dimension is there to make the shape one that no dense weight has: a loader without Trifold would
otherwise take the numbers for the weight and forget the scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats.base import FORMATS, Layout, Spec
from trifold.formats.quantized import scheme_of
from trifold.formats.table import TableFormat


class Fp8Format(TableFormat):
    name = "fp8"

    def stores(self, scheme: Scheme) -> bool:
        return scheme.table is not None and scheme.table.dtype is not None

    def layout(self, spec: Spec) -> Layout:
        scheme = scheme_of(spec)
        assert scheme.table is not None and scheme.table.dtype is not None
        rows, columns = spec["shape"]
        return {
            "weight": ((rows, columns, 1), scheme.table.dtype),
            "weight_scale": (scheme.scale_shape(rows, columns), SCALE_DTYPES[scheme.scale_dtype]),
        }

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Quantized)
        table = canonical.scheme.table
        assert table is not None and table.dtype is not None
        codes = canonical.codes.clone(memory_format=torch.contiguous_format)
        return {"weight": codes.view(table.dtype).unsqueeze(-1), "weight_scale": canonical.scale.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Quantized:
        codes = tensors["weight"].squeeze(-1).view(torch.uint8)
        return Quantized(codes, tensors["weight_scale"], None, scheme_of(spec))


FORMATS.register("fp8")(Fp8Format())
