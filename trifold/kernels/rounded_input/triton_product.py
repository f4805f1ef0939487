"""Activations rounded to 8 bits, times 8-bit codes, on GPUs: two launches, scales, zero-points and bias included."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trifold.core.inputs import InputScheme
from trifold.kernels.shares import processors, share, workspace


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
STEP = 128
"""Inputs that are summed before a scale can change."""
_BLOCK = 16384  # inputs that a block rounds at once, 16 warps at most


def choose(tokens: int) -> Config:
    return CONFIGS[next((limit for limit in CONFIGS if tokens <= limit), max(CONFIGS))]


def round_tokens(
    x: torch.Tensor, scheme: InputScheme, scale: torch.Tensor | None, count: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`core.inputs.quantize_input` of x (M, in): codes, scale (M, 1), and the sums of integer codes, (M,) int32.

    count: int32, becomes zero.
    """
    import triton

    from trifold.kernels.rounded_input.triton_round_kernel import round_tokens as kernel

    rows, in_features = x.shape
    codes = x.new_empty(x.shape, dtype=scheme.dtype)
    token, sums = x.new_empty(rows, 1, dtype=torch.float32), x.new_empty(rows, dtype=torch.int32)
    block = min(triton.next_power_of_2(max(in_features, 128)), _BLOCK)
    kernel[(rows,)](
        x.contiguous(), token if scale is None else scale, codes.view(torch.int8), token, sums,
        sums if count is None else count, 0 if count is None else count.numel(), rows, in_features,
        LARGEST=scheme.largest, FLOAT=scheme.grid != "int", STATIC=scheme.static, BLOCK=block,
        num_warps=max(1, block // 1024),
    )  # fmt: skip
    return codes, token, sums


@torch.library.custom_op("trifold::rounded_linear", mutates_args=())
def rounded_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_bits: int,
    group: int,
) -> torch.Tensor:
    """x (M, in), any float dtype, rounded, times (codes + offset)ᵀ, times both scales, plus bias -> (M, out).

    codes: (out, padded) int8 with padded >= in, summed exactly, or float8_e4m3fn, as x then becomes too, summed as
    tensor cores do. row_scale: float32, (out,), or (out, groups) of `group` inputs each, a multiple of STEP. offset:
    (out,) int32. input_scale: (1,) float32 for all tokens, or None for one each, found here.
    """
    import triton

    from trifold.kernels.rounded_input.triton_product_kernel import multiply

    (tokens, in_features), (out_features, padded) = x.shape, codes.shape
    floats = codes.dtype != torch.int8
    scheme = InputScheme(input_bits, "fp8_e4m3" if floats else "int", input_scale is not None)
    config = choose(tokens)
    blocks = triton.cdiv(tokens, config.bm) * triton.cdiv(out_features, config.bn)
    parts = share(config.warps, blocks, triton.cdiv(in_features, config.bk), processors(x.device))
    y = x.new_empty(tokens, out_features)
    partial, count = workspace(y, parts, blocks, torch.float32 if floats else torch.int32)
    with torch.cuda.device_of(x):
        rounded, token, sums = round_tokens(x, scheme, input_scale, count)
        multiply[(blocks, parts)](
            rounded, sums, token, codes, row_scale, row_scale if offset is None else offset,
            row_scale if bias is None else bias, y, partial, count,
            tokens, out_features, in_features, padded, row_scale.numel() // out_features,
            FLOAT=floats, GROUP=group, OFFSET=offset is not None, BIAS=bias is not None,
            WHOLE=in_features % config.bk == 0, SHARED=parts > 1,
            BM=config.bm, BN=config.bn, BK=config.bk, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


@rounded_linear.register_fake
def _(x, codes, row_scale, offset, bias, input_scale, input_bits, group):
    return x.new_empty(x.shape[0], codes.shape[0])
