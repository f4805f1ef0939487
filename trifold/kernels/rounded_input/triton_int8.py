"""8-bit codes times 8-bit codes on GPUs, scales, zero-points and bias included."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trifold.core.inputs import quantize_input
from trifold.formats.base import Spec
from trifold.formats.quantized import scheme_of
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.rounded_input.naive import input_scheme_of
from trifold.kernels.rounded_input.torch_int8 import LARGEST_SUM, TorchInt8


class Config(NamedTuple):
    """bm: tokens, bn: outputs, bk: inputs of a block."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


CONFIGS: dict[int, Config] = {
    16: Config(16, 64, 128, 4, 4),
    64: Config(64, 64, 128, 4, 4),
    128: Config(128, 64, 128, 8, 3),
}
"""By the largest number of tokens; the last also for more. None has been timed on a GPU."""


def choose(tokens: int) -> Config:
    return CONFIGS[next((limit for limit in CONFIGS if tokens <= limit), max(CONFIGS))]


@torch.library.custom_op("trifold::int8_linear", mutates_args=())
def int8_linear(
    x: torch.Tensor,
    token_scale: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (M, in) int8 times (codes + offset)ᵀ, exactly, then times both scales, plus bias, in float32 -> (M, out).

    token_scale: (M, 1) float32. codes: (out, padded) int8, padded >= in. row_scale: (out,) float32. offset: (out,)
    int32. bias: (out,), any float dtype.
    """
    import triton

    from trifold.kernels.rounded_input.triton_int8_kernel import multiply

    (tokens, in_features), (out_features, padded) = x.shape, codes.shape
    config = choose(tokens)
    y = torch.empty(tokens, out_features, dtype=dtype, device=x.device)
    sums = row_scale if offset is None else x.sum(1, dtype=torch.int32)
    grid = (triton.cdiv(tokens, config.bm) * triton.cdiv(out_features, config.bn),)
    with torch.cuda.device_of(x):
        multiply[grid](
            x.contiguous(), sums, token_scale, codes, row_scale, row_scale if offset is None else offset,
            row_scale if bias is None else bias, y, tokens, out_features, in_features, padded,
            OFFSET=offset is not None, BIAS=bias is not None, WHOLE=in_features % config.bk == 0,
            BM=config.bm, BN=config.bn, BK=config.bk, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


@int8_linear.register_fake
def _(x, token_scale, codes, row_scale, offset, bias, dtype):
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


class TritonInt8(TorchInt8):
    """8-bit weights with one scale per row or tensor; activations of 8 bits or fewer; compute capability 8.0 on."""

    name = "rounded_input.triton_int8"

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme, in_features = scheme_of(spec), spec["shape"][1]
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
        codes, scale = quantize_input(x, input_scheme_of(spec), tensors.get("input_scale"))
        rows = spec["shape"][0]
        row_scale, offset = tensors["weight_scale"].float().reshape(-1).expand(rows).contiguous(), tensors.get("offset")
        offset = None if offset is None else offset.reshape(-1).expand(rows).contiguous()
        return int8_linear(codes, scale.contiguous(), tensors["codes"], row_scale, offset, bias, x.dtype)
