"""8-bit codes times 8-bit codes, summed exactly in int32 by `torch._int_mm`, then scaled."""

from __future__ import annotations

from functools import lru_cache

import torch

from trifold.core.inputs import quantize_input
from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.op import Op, Tensors
from trifold.kernels.rounded_input.naive import input_scheme_of
from trifold.kernels.rows import dequantize, with_codes, zero_points

SIGN = -128  # flips the top bit of a byte: unsigned code <-> code - 128
LARGEST_SUM = 255 * 128  # of one product, |weight code - zero-point| * |activation code|


@lru_cache(maxsize=1)
def _sums_exactly() -> bool:
    """Some processors add pairs of byte products in 16 bits, which saturates on the largest codes."""
    x = torch.full((17, 64), 127, dtype=torch.int8, device="cpu")
    w = torch.full((64, 64), -128, dtype=torch.int8, device="cpu")
    w[1::2] = 127
    return torch.equal(torch._int_mm(x, w.t()).long(), x.long() @ w.long().t())


def integer_product(x: torch.Tensor, codes: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """x (M, in) int8 times (codes + offset)ᵀ -> int32 (M, out), exact.

    codes: (out, padded) int8 with padded >= in, whose surplus meets zeros. offset: (out or 1,) int32.
    """
    total = torch._int_mm(torch.nn.functional.pad(x, (0, codes.shape[1] - x.shape[1])), codes.t())
    if offset is not None:
        total.addcmul_(x.sum(1, keepdim=True, dtype=torch.int32), offset)
    return total


class TorchInt8(Op):
    """8-bit weights with one scale per row or tensor; 8-bit activations; CPUs."""

    name = "rounded_input.torch_int8"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = scheme_of(spec)
        in_features = spec["shape"][1]
        if scheme.bits != 8 or input_scheme_of(spec).bits != 8:
            return f"bits={scheme.bits} with input bits={input_scheme_of(spec).bits} are not 8 and 8"
        if scheme.group_width(in_features) < in_features:
            return f"group_size={scheme.group_size} is neither 'channel' nor 'tensor'"
        if in_features * LARGEST_SUM >= 2**31:
            return f"in_features={in_features} could overflow an int32 sum"
        if not _sums_exactly():
            return "torch._int_mm saturates on this processor"
        return None

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        codes = tensors["weight"].clone(memory_format=torch.contiguous_format).view(torch.int8)
        runtime = {"codes": codes.bitwise_xor_(SIGN), **kept}
        zero = zero_points(tensors, spec, slice(0, spec["shape"][0]))
        if zero is not None:
            runtime["offset"] = 128 - zero.squeeze(1).to(torch.int32)
        return runtime

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        kept = {name: t for name, t in tensors.items() if name not in ("codes", "offset")}
        return {"weight": (tensors["codes"] ^ SIGN).view(torch.int32), **kept}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        codes = (tensors["codes"][start:stop, : spec["shape"][1]] ^ SIGN).view(torch.uint8)
        return dequantize(with_codes(codes, tensors, spec, slice(start, stop)), dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        codes, scale = quantize_input(x, input_scheme_of(spec), tensors.get("input_scale"))
        y = integer_product(codes, tensors["codes"], tensors.get("offset")).float()
        y.mul_(scale).mul_(tensors["weight_scale"].float().t())
        return (y if bias is None else y.add_(bias)).to(x.dtype)
