"""8-bit floats times 8-bit floats on GPUs, scales and bias included."""

from __future__ import annotations

import torch

from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.rounded_input.torch_fp8 import TorchFP8
from trifold.kernels.rounded_input.triton_product import STEP, rounded_linear

_CAPABILITY = (8, 9)
_LIBRARY = 129  # tokens from which the vendor's product runs, where it can; an estimate


class TritonFP8(TorchFP8):
    """FP8 E4M3 weights with one scale per row, tensor or group; FP8 activations; compute capability 8.9 on.

    Tensor cores add products of FP8 with fewer bits than float32 has, about 14 on Hopper; every 128 inputs their sums
    are added in float32.
    """

    name = "rounded_input.triton_fp8"

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"sums are scaled in float32, too coarse for {dtype}"
        in_features = spec["shape"][1]
        width = scheme_of(spec).group_width(in_features)
        if width < in_features and width % STEP:
            return f"group_size={spec['group_size']} is not a multiple of {STEP}"
        return no_gpu(device, _CAPABILITY)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] >= _LIBRARY and super().supports(spec, x.dtype, x.device) is None:
            return super().run(x, tensors, spec, bias)
        (rows, in_features), scale = spec["shape"], tensors["weight_scale"].float()
        width = scheme_of(spec).group_width(in_features)
        scale = scale.expand(rows, -1).contiguous()
        group = width if width < in_features else 0
        return rounded_linear(x, tensors["weight"].squeeze(-1), scale, None, bias, tensors.get("input_scale"), 8, group)
