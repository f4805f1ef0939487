"""Bitmaps and survivors on NVIDIA GPUs, through Triton."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import pad

from trifold.formats.base import Spec
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.sparse.bitmap import counts, mask_tensors, mask_words
from trifold.kernels.weight_only.blockwise import Blockwise

CHUNK = 16
"""Words of a bitmap, of 32 columns each, after which is stored where survivors go on."""
ROWS = 64
WARPS = 4
_BLOCKS = 4  # for each processor of the GPU
_MOST_SHARES = 16


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def tokens_of(tokens: int) -> int:
    """Of a block."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def share_of(out_features: int, tokens: int, chunks: int, device: torch.device) -> int:
    """Chunks of one program, so that every processor has work."""
    blocks = -(-out_features // ROWS) * -(-tokens // tokens_of(tokens))
    shares = max(1, min(_processors(device) * _BLOCKS // max(blocks, 1), chunks, _MOST_SHARES))
    return -(-chunks // shares)


class TritonBitmap(Blockwise):
    """`bitmask` and `sparse24` of bfloat16 or float16, with activations of the same dtype. Capability 8.0 on."""

    name = "sparse.bitmap_triton"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if "dtype" not in spec:
            return "takes survivors that are not rounded to codes"
        if dtype not in (torch.bfloat16, torch.float16) or spec["dtype"] != str(dtype).removeprefix("torch."):
            return f"takes bfloat16 or float16 for activations and survivors alike, not {dtype} and {spec['dtype']}"
        return no_gpu(device)

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        words = mask_words(tensors, spec)
        by_chunk = pad(counts(words), (0, -words.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK)).sum(2)
        offset = by_chunk.flatten().cumsum(0).view_as(by_chunk) - by_chunk
        mask, offset = (tensor.t().contiguous() for tensor in (words, offset.to(torch.int32)))
        return {"mask": mask, "offset": offset, "values": tensors["weight"]}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        words = tensors["mask"].t().clone(memory_format=torch.contiguous_format)
        return {"weight": tensors["values"], **mask_tensors(words, spec)}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return super().rows(self.restore(tensors, spec), spec, start, stop, dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = bitmap_linear(x, tensors["mask"], tensors["offset"], tensors["values"], bias)
        return y


@torch.library.custom_op("trifold::bitmap_linear", mutates_args=())
def bitmap_linear(
    x: torch.Tensor, mask: torch.Tensor, offset: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (M, in) -> (M, out). The tensors are those of `prepare`; sums of one shape are always added in one order."""
    import triton

    from trifold.kernels.sparse.gpu.bitmap_kernels import multiply, total

    (tokens, in_features), (chunks, out_features) = x.shape, offset.shape
    share = share_of(out_features, tokens, chunks, x.device)
    parts, together = triton.cdiv(chunks, share), tokens_of(tokens)
    y = x.new_empty(tokens, out_features)
    partial = x.new_empty(parts if parts > 1 else 0, tokens, out_features, dtype=torch.float32)
    given = values if bias is None else bias
    with torch.cuda.device_of(x):
        multiply[(triton.cdiv(out_features, ROWS) * triton.cdiv(tokens, together), parts)](
            x.contiguous(), mask, offset, values, given, y, partial, tokens, out_features, in_features, chunks, share,
            BIAS=bias is not None, WHOLE=in_features % 32 == 0, SHARED=parts > 1, CHUNK=CHUNK, BN=ROWS, BM=together,
            num_warps=WARPS,
        )  # fmt: skip
        if parts > 1:
            total[(triton.cdiv(y.numel(), 1024),)](
                partial, given, y, out_features, y.numel(), parts, BIAS=bias is not None, BLOCK=1024
            )
    return y


@bitmap_linear.register_fake
def _(x, mask, offset, values, bias):
    return x.new_empty(x.shape[0], offset.shape[1])
