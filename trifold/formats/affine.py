"""`affine`: uniform integers of 1..8 bits with scales and real zero-points.

    weight_zero_point  scale_dtype, scheme.scale_shape

See `formats/quantized.py` for codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.scheme import Scheme
from trifold.formats.base import FORMATS, Layout, Spec
from trifold.formats.quantized import QuantizedFormat, group_label


class AffineFormat(QuantizedFormat):
    name = "affine"

    def stores(self, scheme: Scheme) -> bool:
        return scheme.grid == "int" and scheme.zero_point == "real"

    def describe(self, canonical: Canonical) -> Spec:
        return super().describe(canonical) | {"zero_point": "real"}

    def label(self, spec: Spec) -> str:
        return f"int{spec['bits']} {group_label(spec)} affine"

    def layout(self, spec: Spec) -> Layout:
        layout = super().layout(spec)
        return layout | {"weight_zero_point": layout["weight_scale"]}

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Quantized) and canonical.zero_point is not None
        return super().pack(canonical) | {"weight_zero_point": canonical.zero_point.contiguous()}

    def zero_point(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> torch.Tensor | None:
        return tensors["weight_zero_point"]


FORMATS.register("affine")(AffineFormat())
