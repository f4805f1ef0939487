"""Groups of integers, survivors alone, on NVIDIA GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trifold.core.scheme import SCALE_DTYPES
from trifold.formats.base import Spec
from trifold.formats.bitmask import starts_of
from trifold.formats.bitstream import unpack_bits
from trifold.formats.group_sparse import groups_in_row
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import pack_stream
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.shares import processors, share, workspace
from trifold.kernels.sparse.cpu import check_starts
from trifold.kernels.weight_only.blockwise import Blockwise
from trifold.kernels.weight_only.planes.layout import layout_of
from trifold.kernels.weight_only.planes.ops import prepared

WIDTHS = (2, 4, 8)  # of one plane, so that a word has whole codes
ROWS = 32
"""That share a bitmap of each column of groups."""
_BN = 64  # outputs of a program
_COLUMNS = 8  # of which a tile has that many or a divisor
_SPAN = 256  # inputs that are multiplied before their sums are scaled, at most
MOST_TOKENS = 16
"""Beyond, dense tiles: every 8 tokens cost as much as the weights do."""


class Config(NamedTuple):
    """bm: tokens of a block. phases: groups whose sums are kept apart. tile: groups of one. bn: outputs."""

    bm: int
    phases: int
    tile: int
    bn: int = _BN
    warps: int = 2
    stages: int = 2
    registers: int = 255


def choose(bits: int, group: int, tokens: int) -> Config:
    """phases * bm columns of a tensor core's 8, or more, so that an instruction's 16 inputs are of as many groups as
    its words come from."""
    bm = next((limit for limit in (1, 2, 4) if tokens <= limit), 8)
    phases = max(min(8 // bm, _SPAN // group), 16 * (16 // bits) // group, 1)
    return Config(max(bm, 8 // phases), phases, max(phases, 128 // group))


class TritonGroups(Blockwise):
    """`group_sparse_int` of 2, 4 and 8 bits, groups of 16 to 128; float16 and bfloat16 activations. Capability 8.0 on.

    The runtime layout has survivors by blocks of 32 rows, in these by columns of groups, in these by rows, each with
    its scale and zero-point in one number. `map` says for each column of a block which rows are there and where the
    first is. A group is W words of 16 bits, as in `planes.layout`: word i has in its slot j code W j + i.
    """

    name = "sparse.groups_triton"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if spec.get("scale_bits"):
            return "takes scales of one level, not scale_bits=8"
        if spec["bits"] not in WIDTHS:
            return f"bits={spec['bits']} is not 2, 4 or 8"
        if spec["group_size"] not in (16, 32, 64, 128):
            return f"group_size={spec['group_size']} is not 16, 32, 64 or 128"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"takes torch.float16 or torch.bfloat16 activations, not {dtype}"
        if (spec["groups"] + 1) * spec["group_size"] * spec["bits"] // 16 >= 2**31:
            return f"groups={spec['groups']} overflow an int32 index"
        return no_gpu(device)

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        start, groups, scheme = tensors["weight_row_start"], spec["groups"], scheme_of(spec)
        check_starts(start, groups)
        rows = spec["shape"][0]
        blocks, columns = -(-rows // _BN) * _BN // ROWS, -(-groups_in_row(spec) // _COLUMNS) * _COLUMNS
        row = torch.repeat_interleave(torch.arange(rows, device=start.device), start.diff().long())
        column = tensors["weight_column"].long()
        order = torch.argsort((row // ROWS * columns + column) * ROWS + row % ROWS)
        place = (column * blocks + row // ROWS)[order]
        bits = torch.zeros(columns, blocks, dtype=torch.int64, device=start.device)
        bits.view(-1).index_add_(0, place, 1 << (row % ROWS)[order])
        counts = torch.zeros_like(bits)
        counts.view(-1).index_add_(0, place, torch.ones_like(place))
        ahead = (counts.t().flatten().cumsum(0) - counts.t().flatten()).view(blocks, columns).t()
        zero = torch.full((groups,), int(scheme.midpoint), dtype=torch.uint8, device=start.device)
        if not spec["symmetric"]:
            zero = unpack_bits(tensors["weight_zero_point"][None], spec["bits"], groups)[0]
        codes = unpack_bits(tensors["weight"][None], spec["bits"], groups * spec["group_size"])[0]
        return {
            "words": _words(codes.view(groups, spec["group_size"])[order], spec["bits"]),
            "meta": _meta(tensors["weight_scale"][order], zero[order]),
            "map": ahead.contiguous() | bits << 32,
        }

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        rows, groups = spec["shape"][0], spec["groups"]
        bits = tensors["map"] >> 32
        there = (bits[..., None] >> torch.arange(ROWS, device=bits.device) & 1).bool()  # column, block, row of it
        block, column, inner = there.transpose(0, 1).nonzero().unbind(1)
        row = block * ROWS + inner
        order = torch.argsort(row * len(bits) + column)
        codes = _codes(tensors["words"][:groups][order], spec["bits"])
        scale, zero = _parted(tensors["meta"][:groups][order], scheme_of(spec).scale_dtype)
        few = groups_in_row(spec) <= 256
        portable = {
            "weight": pack_stream(codes, spec["bits"]),
            "weight_row_start": starts_of(torch.bincount(row, minlength=rows)),
            "weight_column": column[order].to(torch.uint8 if few else torch.int16),
            "weight_scale": scale,
        }
        if not spec["symmetric"]:
            portable["weight_zero_point"] = pack_stream(zero, spec["bits"])
        return portable

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return super().rows(self.restore(tensors, spec), spec, start, stop, dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] > MOST_TOKENS:
            return Blockwise().run(x, self.restore(tensors, spec), spec, bias)
        words, meta, where = (tensors[name] for name in ("words", "meta", "map"))
        y: torch.Tensor = group_linear(x, words, meta, where, bias, spec["shape"][0], spec["bits"], spec["group_size"])
        return y


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (groups, group) -> int16 (groups + 1, words); the last is for programs that look past the end."""
    slots = codes.unflatten(1, (16 // bits, -1)).to(torch.int16)
    words = torch.zeros_like(slots[:, 0])
    for j, (_, bit) in enumerate(layout_of(bits).places[0]):
        words |= slots[:, j] << bit
    return torch.nn.functional.pad(words, (0, 0, 0, 1))


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int16 (groups, words) -> codes (groups, group) uint8."""
    parts = [words >> bit & (1 << bits) - 1 for _, bit in layout_of(bits).places[0]]
    return torch.stack(parts, 1).flatten(1).to(torch.uint8)


def _meta(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Scales (groups,), and zero-points below them: int32 of two bfloat16, or int64 of float32 and bfloat16."""
    low = zero.to(torch.bfloat16).view(torch.int16)
    if scale.dtype == torch.bfloat16:
        made = torch.stack([low, scale.view(torch.int16)], 1).view(torch.int32)
    else:
        made = torch.stack([low.to(torch.int32), scale.float().view(torch.int32)], 1).view(torch.int64)
    return torch.nn.functional.pad(made[:, 0], (0, 1))


def _parted(meta: torch.Tensor, scale_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: scales, and zero-points uint8."""
    if meta.dtype == torch.int32:
        low, scale = meta.view(torch.int16).unflatten(0, (-1, 2)).unbind(1)
        scale = scale.clone().view(torch.bfloat16)
    else:
        low, scale = meta.view(torch.int32).unflatten(0, (-1, 2)).unbind(1)
        low, scale = low.to(torch.int16), scale.clone().view(torch.float32).to(SCALE_DTYPES[scale_dtype])
    return scale, low.clone().view(torch.bfloat16).to(torch.uint8)


@torch.library.custom_op("trifold::group_sparse_linear", mutates_args=())
def group_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    meta: torch.Tensor,
    where: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    bits: int,
    group: int,
) -> torch.Tensor:
    """x (M, in) -> (M, out). The tensors are those of `prepare`; sums of one shape are always added in one order."""
    import triton

    from trifold.kernels.sparse.gpu.group_kernels import multiply

    tokens, columns, layout = len(x), len(where), layout_of(bits)
    config = choose(bits, group, tokens)
    tiles = columns // config.tile
    blocks = triton.cdiv(tokens, config.bm) * triton.cdiv(out_features, config.bn)
    parts = share(config.warps, blocks, tiles, processors(x.device))
    y = x.new_empty(tokens, out_features)
    with torch.cuda.device_of(x):
        partial, count = workspace(y, parts, blocks)
        slot, span = group * bits // 16, config.phases * group
        multiply[(blocks, parts)](
            *prepared(x, count, columns * group, group, layout.shifts[1], slot, span),
            words, meta, where, meta if bias is None else bias, y, partial, count, tokens, out_features, tiles,
            LAYOUT=layout, GROUP=group, T=config.tile, PHASES=config.phases, WIDE=meta.dtype == torch.int64,
            BIAS=bias is not None, SHARED=parts > 1, BN=config.bn, BM=config.bm,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return y


@group_linear.register_fake
def _(x, words, meta, where, bias, out_features, bits, group):
    return x.new_empty(x.shape[0], out_features)
