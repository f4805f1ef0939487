"""`int`: uniform integers of 1..8 bits with scales and zero-points.

    weight             int32 (out, ceil(in * bits / 32))      bitstream of codes along each row
    weight_scale       scale_dtype, scheme.scale_shape
    weight_zero_point  int32 (ceil(rows * bits / 32), groups)  bitstream down each column; asymmetric only

`rows` is the number of rows of the scales. The codes bear the dense weight's own name, in a shape that no
dense weight has, so that a loader without Trifold stops instead of filling in random weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trifold.core.canonical import Canonical, Quantized
from trifold.core.errors import InputError
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats.base import FORMATS, Format, Layout, Spec
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for


def scheme_of(spec: Spec) -> Scheme:
    """The scheme that a spec of this format describes."""
    return Scheme(spec["bits"], spec["group_size"], spec["symmetric"], spec["scale_dtype"])


class IntFormat(Format):
    def holds(self, canonical: Canonical) -> bool:
        return isinstance(canonical, Quantized)

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Quantized)
        scheme = canonical.scheme
        return {
            "format": "int",
            "shape": list(canonical.shape),
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            "scale_dtype": scheme.scale_dtype,
        }

    def label(self, spec: Spec) -> str:
        group = spec["group_size"]
        width = f"g{group}" if isinstance(group, int) else str(group)
        return f"int{spec['bits']} {width} {'sym' if spec['symmetric'] else 'asym'}"

    def layout(self, spec: Spec) -> Layout:
        scheme = scheme_of(spec)
        rows, columns = spec["shape"]
        words = words_for(columns, scheme.bits)
        if words == columns:
            raise InputError(f"a weight of shape {(rows, columns)} has too few inputs to pack; leave it dense")
        scale_rows, groups = scheme.scale_shape(rows, columns)
        layout: Layout = {
            "weight": ((rows, words), torch.int32),
            "weight_scale": ((scale_rows, groups), SCALE_DTYPES[scheme.scale_dtype]),
        }
        if not scheme.symmetric:
            layout["weight_zero_point"] = ((words_for(scale_rows, scheme.bits), groups), torch.int32)
        return layout

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Quantized)
        bits = canonical.scheme.bits
        tensors = {
            "weight": pack_bits(canonical.codes, bits),
            "weight_scale": canonical.scale.contiguous(),
        }
        if canonical.zero_point is not None:
            tensors["weight_zero_point"] = pack_bits(canonical.zero_point.T, bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Quantized:
        scheme = scheme_of(spec)
        rows, columns = spec["shape"]
        zero = None
        if not scheme.symmetric:
            scale_rows, _ = scheme.scale_shape(rows, columns)
            zero = unpack_bits(tensors["weight_zero_point"].T.contiguous(), scheme.bits, scale_rows)
            zero = zero.T.contiguous()
        codes = unpack_bits(tensors["weight"], scheme.bits, columns)
        return Quantized(codes, tensors["weight_scale"], zero, scheme)


FORMATS.register("int")(IntFormat())
