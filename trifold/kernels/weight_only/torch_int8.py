"""torch's int8 product for bfloat16 activations on CPUs: `aten::_weight_int8pack_mm`.

It multiplies bfloat16 activations by int8 codes in float32 and scales the sums, one scale for each output.
"""

from __future__ import annotations

import torch

from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.op import Tensors
from trifold.kernels.rows import dequantize, with_codes
from trifold.kernels.weight_only.blockwise import Blockwise

DENSE_FROM = 64
"""Number of tokens from which dequantised tiles are faster: measured on a core with AVX-512 and AMX."""
MULTIPLE = 32
"""The product reads whole vectors of inputs, and past the end of other rows."""
_SIGN = -128  # flips the top bit of a byte: unsigned code <-> code - 128


class TorchInt8(Blockwise):
    """8 bits, symmetric, one scale per row or tensor; bfloat16 activations; CPUs with AVX2 or AVX-512."""

    name = "weight_only.torch_int8"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = scheme_of(spec)
        in_features = spec["shape"][1]
        if scheme.scale_dtype != "bfloat16":
            return f"scale_dtype={scheme.scale_dtype} would be rounded to bfloat16"
        if scheme.bits != 8 or not scheme.symmetric:
            return f"bits={scheme.bits} with symmetric={scheme.symmetric} are not 8 and true"
        if scheme.group_width(in_features) < in_features:
            return f"group_size={scheme.group_size} is neither 'channel' nor 'tensor'"
        if in_features % MULTIPLE:
            return f"in_features={in_features} is not a multiple of {MULTIPLE}"
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX"):
            return f"the processor ({capability}) has no fast path for it"
        return None

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        codes = tensors["weight"].clone(memory_format=torch.contiguous_format).view(torch.int8)
        return {"codes": codes.bitwise_xor_(_SIGN), **kept}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        return {"weight": (tensors["codes"] ^ _SIGN).view(torch.int32), **kept}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        codes = (tensors["codes"][start:stop] ^ _SIGN).view(torch.uint8)
        return dequantize(with_codes(codes, tensors, spec, slice(start, stop)), dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] >= DENSE_FROM:
            return super().run(x, tensors, spec, bias)
        scale = tensors["weight_scale"].expand(spec["shape"][0], 1).contiguous().view(-1)  # strides are not looked at
        y = torch._weight_int8pack_mm(x.contiguous(), tensors["codes"], scale)
        return y if bias is None else y.add_(bias)
