"""What the formats of `Quantized` tensors share: a bitstream of codes, scales, and a spec that spells the scheme.

    weight        int32 (out, ceil(in * bits / 32))   bitstream of codes along each row
    weight_scale  scale_dtype, scheme.scale_shape

The codes bear the dense weight's own name, in a shape that no dense weight has, so that a loader without
Trifold stops instead of filling in random weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.errors import InputError
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats.base import Format, Layout, Spec
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for


def scheme_of(spec: Spec) -> Scheme:
    """The scheme that a spec of any of these formats describes."""
    grid, zero_point = spec.get("grid", "int"), spec.get("zero_point", "integer")
    return Scheme(spec["bits"], spec["group_size"], spec["symmetric"], spec["scale_dtype"], grid, zero_point)


def group_label(spec: Spec) -> str:
    """`g128`, `channel` or `tensor`."""
    group = spec["group_size"]
    return f"g{group}" if isinstance(group, int) else str(group)


class QuantizedFormat(Format):
    """name: under which it is registered."""

    name: ClassVar[str]

    @abstractmethod
    def stores(self, scheme: Scheme) -> bool:
        """Whether this is the format of such a scheme."""

    def holds(self, canonical: Canonical) -> bool:
        return isinstance(canonical, Quantized) and self.stores(canonical.scheme)

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Quantized)
        scheme = canonical.scheme
        return {
            "format": self.name,
            "shape": list(canonical.shape),
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            "scale_dtype": scheme.scale_dtype,
        }

    def layout(self, spec: Spec) -> Layout:
        scheme = scheme_of(spec)
        rows, columns = spec["shape"]
        words = words_for(columns, scheme.bits)
        if words == columns:
            raise InputError(f"a weight of shape {(rows, columns)} has too few inputs to pack; leave it dense")
        return {
            "weight": ((rows, words), torch.int32),
            "weight_scale": (scheme.scale_shape(rows, columns), SCALE_DTYPES[scheme.scale_dtype]),
        }

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Quantized)
        return {
            "weight": pack_bits(canonical.codes, canonical.scheme.bits),
            "weight_scale": canonical.scale.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Quantized:
        codes = unpack_bits(tensors["weight"], spec["bits"], spec["shape"][1])
        return Quantized(codes, tensors["weight_scale"], self.zero_point(tensors, spec), scheme_of(spec))

    def zero_point(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> torch.Tensor | None:
        """Zero-points in the shape of the scales, None where there are none."""
        return None
