"""Groups of integers, survivors alone, on NVIDIA GPUs: every program multiplies equally many of them."""

from __future__ import annotations

from functools import lru_cache

import torch

from trifold.formats.base import Spec
from trifold.formats.bitstream import unpack_bits
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import pack_stream
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.sparse.cpu import check_starts
from trifold.kernels.weight_only.blockwise import Blockwise

WIDTHS = (2, 4, 8)  # codes that fill words of 32 bits in their order
BLOCK = 64  # groups of 16 that a program takes at once; fewer of longer ones
_PROGRAMS = 32  # for each processor of the GPU
_LEAST = 256  # groups of a program
MOST_TOKENS = 16
"""Beyond, dense tiles: each token costs as much as the weights do."""


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def range_of(count: int, device: torch.device) -> int:
    """Groups of one program."""
    return max(_LEAST, -(-count // (_processors(device) * _PROGRAMS)))


def warps_of(bits: int) -> int:
    """Two where one has not the registers."""
    return 2 if bits == 8 else 1


def block_of(group: int) -> int:
    return max(8, BLOCK * 16 // group)


class TritonGroups(Blockwise):
    """`group_sparse_int` of 2, 4 and 8 bits, groups of 16 to 128; any float activations. Capability 8.0 on."""

    name = "sparse.groups_triton"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if spec.get("scale_bits"):
            return "takes scales of one level, not scale_bits=8"
        if spec["bits"] not in WIDTHS:
            return f"bits={spec['bits']} is not 2, 4 or 8"
        if spec["group_size"] not in (16, 32, 64, 128):
            return f"group_size={spec['group_size']} is not 16, 32, 64 or 128"
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"takes float32, bfloat16 and float16 activations, not {dtype}"
        return no_gpu(device)

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        start, groups = tensors["weight_row_start"], spec["groups"]
        check_starts(start, groups)
        length = range_of(groups, start.device)
        ranges = torch.arange(0, max(groups, 1), length, device=start.device)
        first = torch.searchsorted(start[1:].contiguous(), ranges.to(start.dtype), right=True)
        first[0] = 0
        end = torch.full((1,), spec["shape"][0], dtype=first.dtype, device=first.device)
        made = {
            "words": tensors["weight"],  # whole words to a group: the stream is what the kernel wants
            "start": start,
            "first": torch.cat([first, end]).to(torch.int32),
            "number": tensors["weight_column"],
            "scale": tensors["weight_scale"],
        }
        if not spec["symmetric"]:
            made["zero"] = unpack_bits(tensors["weight_zero_point"][None], spec["bits"], groups)[0]
        return made

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        portable = {
            "weight": tensors["words"],
            "weight_row_start": tensors["start"],
            "weight_column": tensors["number"],
            "weight_scale": tensors["scale"],
        }
        if not spec["symmetric"]:
            portable["weight_zero_point"] = pack_stream(tensors["zero"], spec["bits"])
        return portable

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return super().rows(self.restore(tensors, spec), spec, start, stop, dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] > MOST_TOKENS:
            portable = self.restore(tensors, spec)
            return Blockwise().run(x, portable, spec, bias)
        y: torch.Tensor = group_linear(
            x, tensors["words"], tensors["start"], tensors["first"], tensors["number"], tensors["scale"],
            tensors.get("zero"), bias, spec["bits"], spec["group_size"], scheme_of(spec).midpoint,
        )  # fmt: skip
        return y


@torch.library.custom_op("trifold::group_sparse_linear", mutates_args=())
def group_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    start: torch.Tensor,
    first: torch.Tensor,
    number: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    midpoint: float,
) -> torch.Tensor:
    """x (M, in) -> (M, out). The tensors are those of `prepare`; sums of one shape are always added in one order."""
    import triton

    from trifold.kernels.sparse.gpu.group_kernels import join, multiply

    (tokens, in_features), out_features, count = x.shape, len(start) - 1, len(number)
    ranges, length = len(first) - 1, range_of(count, x.device)
    y = x.new_empty(tokens, out_features)
    head, tail = (x.new_empty(ranges, tokens, dtype=torch.float32) for _ in range(2))
    given = scale if bias is None else bias
    together = 1 if tokens == 1 else 4
    with torch.cuda.device_of(x):
        multiply[(ranges, triton.cdiv(tokens, together))](
            x.contiguous(), words, number, scale, scale if zero is None else zero, start, first, given, y, head, tail,
            tokens, out_features, in_features, count, length,
            BITS=bits, GROUP=group, MIDPOINT=midpoint, ASYMMETRIC=zero is not None, BIAS=bias is not None,
            WHOLE=in_features % group == 0, B=block_of(group), TOKENS=together, num_warps=warps_of(bits),
        )  # fmt: skip
        if ranges > 1:
            join[(ranges - 1, tokens)](
                start, first, given, y, head, tail, tokens, out_features, count, length, BIAS=bias is not None,
                num_warps=1,
            )  # fmt: skip
    return y


@group_linear.register_fake
def _(x, words, start, first, number, scale, zero, bias, bits, group, midpoint):
    return x.new_empty(x.shape[0], start.shape[0] - 1)
