"""4-bit and 8-bit codes in groups times activations of at most 8 bits, on CPUs with VNNI."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.op import Call, Op, Tensors
from trifold.kernels.rounded_input.naive import input_scheme_of
from trifold.kernels.rounded_input.torch_int8 import LARGEST_SUM
from trifold.kernels.weight_only import cpu

VARIANTS = ("amx", "avx512_bf16")


class CompiledInt8(cpu.Compiled):
    """Sums of a group are exact; the weight-only kernels' layout (W4A8)."""

    def __init__(self, variant: str) -> None:
        super().__init__(variant)
        self.name = f"rounded_input.cpu_{variant}"  # type: ignore[misc]

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = scheme_of(spec)
        if input_scheme_of(spec).full_range:
            return "rounds activations to codes of both signs alike, not over the full range"
        if scheme.table is not None or scheme.bits not in (4, 8):
            return f"takes integers of 4 and 8 bits, not {scheme.bits} of grid={scheme.grid!r}"
        if scheme.zero_point != "integer":
            return f"takes integer zero-points, not zero_point={scheme.zero_point!r}"
        if scheme.group_width(spec["shape"][1]) * LARGEST_SUM >= 2**31:
            return f"a group of {scheme.group_width(spec['shape'][1])} could overflow an int32 sum"
        return super().supports(spec, dtype, device)

    def bind(self, tensors: Tensors, spec: Spec) -> Call:
        return Op.bind(self, tensors, spec)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dtype == torch.float16:
            return self.run(x.float(), tensors, spec, None if bias is None else bias.float()).half()
        largest = int(input_scheme_of(spec).largest)
        codes, scale, zero, _, shape, bits = cpu.stored(tensors, spec)
        given = tensors.get("input_scale")
        y: torch.Tensor = torch.ops.trifold.packed_linear_int8(
            x, bias, codes, scale, zero, given, shape, largest, bits, self.variant
        )
        return y


def _packed_linear_int8(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    given: torch.Tensor | None,
    shape: Sequence[int],
    largest: int,
    bits: int,
    variant: str,
) -> torch.Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    return cpu.library(variant, bits).rounded_linear(x, tuple(shape), codes, scale, zero, given, largest, bias)


torch.library.define(
    "trifold::packed_linear_int8",
    "(Tensor x, Tensor? bias, Tensor codes, Tensor scale, Tensor? zero, Tensor? given, int[] shape, int largest, "
    "int bits, str variant) -> Tensor",
)
torch.library.impl("trifold::packed_linear_int8", "cpu", _packed_linear_int8)


@torch.library.register_fake("trifold::packed_linear_int8")
def _(x, bias, codes, scale, zero, given, shape, largest, bits, variant):
    return x.new_empty(x.shape[0], shape[0])
