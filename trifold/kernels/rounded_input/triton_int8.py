"""8-bit codes times 8-bit codes on GPUs, scales, zero-points and bias included."""

from __future__ import annotations

import torch

from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.rounded_input.naive import input_scheme_of
from trifold.kernels.rounded_input.torch_int8 import LARGEST_SUM, TorchInt8
from trifold.kernels.rounded_input.triton_product import rounded_linear


class TritonInt8(TorchInt8):
    """8-bit weights with one scale per row or tensor; activations of 8 bits or fewer; compute capability 8.0 on."""

    name = "rounded_input.triton_int8"

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme, in_features = scheme_of(spec), spec["shape"][1]
        if input_scheme_of(spec).full_range:
            return "rounds activations to codes of both signs alike, not over the full range"
        if scheme.bits != 8:
            return f"bits={scheme.bits} are not 8"
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"sums are scaled in float32, too coarse for {dtype}"
        if scheme.group_width(in_features) < in_features:
            return f"group_size={scheme.group_size} is neither 'channel' nor 'tensor'"
        if in_features * LARGEST_SUM >= 2**31:
            return f"in_features={in_features} could overflow an int32 sum"
        return no_gpu(device)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        rows = spec["shape"][0]
        row_scale, offset = tensors["weight_scale"].float().reshape(-1).expand(rows).contiguous(), tensors.get("offset")
        offset = None if offset is None else offset.reshape(-1).expand(rows).contiguous()
        bits, given = input_scheme_of(spec).bits, tensors.get("input_scale")
        return rounded_linear(x, tensors["codes"], row_scale, offset, bias, given, bits, 0)
