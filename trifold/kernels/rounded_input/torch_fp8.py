"""8-bit floats times 8-bit floats, summed in float32 by `torch._scaled_mm`, with one scale per token and row."""

from __future__ import annotations

from functools import lru_cache

import torch

from trifold.core.inputs import quantize_input
from trifold.formats.base import Spec
from trifold.kernels.op import Op, Tensors
from trifold.kernels.rounded_input.naive import input_scheme_of

_MULTIPLE = 16  # of both dimensions, that GPUs want
_CAPABILITY = (8, 9)


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, token_scale: torch.Tensor, row_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x (M, in) float8 times weight (out, in) float8, transposed -> (M, out) of `dtype`.

    token_scale: (M, 1) float32. row_scale: (1, out) float32, contiguous.
    """
    return torch._scaled_mm(x, weight.t(), scale_a=token_scale, scale_b=row_scale, out_dtype=dtype)


@lru_cache(maxsize=1)
def _exact_on_cpu() -> bool:
    """Whether this build has the product, with float32 sums of unrounded products, for sizes of any kind."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 43, generator=generator).to(torch.float8_e4m3fn) for n in (3, 7))
    token, row = torch.rand(3, 1, generator=generator) + 0.5, torch.rand(1, 7, generator=generator) + 0.5
    try:
        found = scaled_product(x, w, token, row, torch.float32)
    except (RuntimeError, ValueError, AttributeError):
        return False
    return torch.allclose(found, (x.float() * token) @ (w.float() * row.t()).t(), rtol=1e-5, atol=1e-5)


class TorchFP8(Op):
    """FP8 E4M3 weights with one scale per row or tensor; FP8 activations; CPUs, and GPUs from sm_89 on."""

    name = "rounded_input.torch_fp8"

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if spec["group_size"] not in ("channel", "tensor"):
            return f"group_size={spec['group_size']} is neither 'channel' nor 'tensor'"
        if device.type == "cpu":
            return None if _exact_on_cpu() else "this build of torch has no exact FP8 product for CPUs"
        if device.type != "cuda":
            return f"runs on cpu and cuda, not {device.type}"
        if dtype != torch.bfloat16:
            return f"gives torch.bfloat16 on cuda, not {dtype}"
        if any(size % _MULTIPLE for size in spec["shape"]):
            return f"shape={spec['shape']} is not made of multiples of {_MULTIPLE}"
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            return f"compute capability {capability} is below {_CAPABILITY}"
        return None

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        codes, scale = quantize_input(x, input_scheme_of(spec), tensors.get("input_scale"))
        rows = tensors["weight_scale"].float().t().expand(1, spec["shape"][0]).contiguous()
        result = torch.bfloat16 if x.is_cuda else torch.float32
        y = scaled_product(codes, tensors["weight"].squeeze(-1), scale, rows, result)
        return (y if bias is None else y + bias).to(x.dtype)
