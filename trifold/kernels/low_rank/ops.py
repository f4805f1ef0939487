"""Products of low rank as an operator of torch: activations, the right factor, and the rest, a launch each."""

from __future__ import annotations

import json
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch

from trifold.kernels.shares import processors, share, workspace
from trifold.kernels.weight_only.planes.configs import Config, choose
from trifold.kernels.weight_only.planes.layout import SLOT, Layout, layout_of
from trifold.kernels.weight_only.planes.ops import grid_of, prepared

PLAIN = "16 bits"
"""The kind of a factor (rows, columns) of 16-bit numbers as they are."""


class Kind(NamedTuple):
    """How a matrix is packed in planes, as `plane_linear` takes it."""

    bits: int
    group: int
    grid: str
    midpoint: float
    asymmetric: bool

    @property
    def text(self) -> str:
        return json.dumps(self)


@lru_cache(maxsize=64)
def _kind(text: str) -> Kind:
    return Kind(*json.loads(text))


class _Planes(NamedTuple):
    """A packed matrix as kernels take it."""

    tensors: list[torch.Tensor]  # three planes, scale, zero
    kind: Kind
    layout: Layout
    flush: int  # inputs whose sum is scaled at once

    @classmethod
    def of(cls, tensors: list[torch.Tensor], text: str) -> _Planes:
        kind = _kind(text)
        layout, count = layout_of(kind.bits), len(tensors) - 1 - kind.asymmetric
        planes, numbers = tensors[:count], tensors[count:]
        given = [*planes, *[planes[0]] * (3 - count), numbers[0], numbers[-1]]
        return cls(given, kind, layout, gcd(kind.group, layout.tile))

    def constants(self, before: str = "") -> dict[str, Any]:
        found = {
            "LAYOUT": self.layout,
            "GRID": grid_of(self.kind.grid),
            "GROUP": self.kind.group,
            "FLUSH": self.flush // SLOT,
            "MIDPOINT": self.kind.midpoint,
            "ASYMMETRIC": self.kind.asymmetric,
        }
        return {before + name: value for name, value in found.items()}

    @property
    def out_features(self) -> int:
        return self.tensors[3].shape[1]

    @property
    def groups(self) -> int:
        return self.tensors[3].shape[0]

    def wants(self, in_features: int) -> tuple[int, int, int]:
        """What `prepared` is told of inputs that meet it."""
        step = self.layout.shifts[1] if self.kind.grid == "int" else 0
        return self.layout.tiles(in_features) * self.layout.tile, self.flush, step


_REGISTERS = 255  # two loops need more than the one that tiles were chosen for
_MOST_SLOTS = 16  # of a tile
_ABSENT = Kind(4, 128, "int", 0.0, False)


def tiles_for(base: int | None, left: int | None, tokens: int) -> Config:
    """Of the last product, by the bits of a packed base and of a packed left factor.

    The more slots a tile has, the more registers its loop wants, and the left factor's more than the other, since it
    rounds z to fp16 slot by slot: fewer tokens leave them, or more threads among which what is not weights is divided.
    """
    both = [bits for bits in (base, left) if bits]
    base_slots, left_slots = (layout_of(bits).slots if bits else 0 for bits in (base, left))
    tokens = min(tokens, 8) if left_slots >= 8 else tokens
    if left_slots == _MOST_SLOTS or (base_slots == _MOST_SLOTS and tokens > 8):
        found = [choose(bits, tokens) for bits in both]
        stages = 2 if base_slots == left_slots else 3
        return Config(2 * min(config.bn for config in found), found[0].bm, 4, stages, _REGISTERS)
    return choose(both[0] if both else 4, tokens)._replace(registers=_REGISTERS)


@torch.library.custom_op("trifold::low_rank_linear", mutates_args=())
def low_rank_linear(
    x: torch.Tensor,
    base: list[torch.Tensor],
    right: list[torch.Tensor],
    left: list[torch.Tensor],
    kinds: str,
    places: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x (M, in) float16 or bfloat16 -> (M, out), the same dtype: (x right^T) left^T, and x base^T if there is one.

    Each matrix is its planes, scale and zero, or one matrix of x's dtype. kinds: of base, right and left, each on a
    line of its own, a `Kind`'s text, PLAIN, or for no base nothing. With places (out,) int64 outputs places[:rank] are
    x right^T itself, and the others those of left in their order. Sums of one shape on one GPU are always added in the
    same order.
    """
    import triton

    from trifold.kernels.low_rank.kernel import finish

    tokens, in_features = x.shape
    base_kind, right_kind, left_kind = kinds.split("\n")
    first = None if right_kind == PLAIN else _Planes.of(right, right_kind)
    second = None if left_kind == PLAIN else _Planes.of(left, left_kind)
    whole = _Planes.of(base, base_kind) if base_kind else None
    main, after = (found or _Planes.of([x, x], _ABSENT.text) for found in (whole, second))
    rows, rank = _rows(left), right[0].shape[0] if first is None else first.out_features
    y = x.new_empty(tokens, rows if places is None else len(places))
    config = tiles_for(whole and whole.kind.bits, second and second.kind.bits, tokens)
    m_blocks, parts = triton.cdiv(tokens, config.bm), 1
    blocks = m_blocks * triton.cdiv(rows, config.bn)
    if whole is not None:
        parts = share(config.warps, blocks, whole.layout.tiles(in_features), processors(x.device))
    with torch.cuda.device_of(x):
        partial, count = workspace(y, parts, blocks)
        if first is None:
            z, ready = torch.nn.functional.linear(x, right[0]), None
        else:
            z, ready, count = _right(x, first, count)
        if whole is not None and (first is None or whole.wants(in_features) != first.wants(in_features)):
            ready = prepared(x, count, *whole.wants(in_features))
        copied = 0 if places is None else m_blocks * triton.cdiv(rank, config.bn)
        finish[(blocks + copied, parts)](
            *(ready or (y, y, y)), *main.tensors, z, *(after.tensors if second else [left[0]] * 5),
            y if places is None else places, y if bias is None else bias, y, partial, count,
            tokens, y.shape[1], rows, main.layout.tiles(in_features), main.groups, rank, after.layout.tiles(rank),
            after.groups, BASE=whole is not None, **main.constants(), PACKED=second is not None,
            **after.constants("LEFT_"), PLACED=places is not None, BIAS=bias is not None, SHARED=parts > 1,
            **_tiles(config),
        )  # fmt: skip
    return y


def _right(x: torch.Tensor, factor: _Planes, count: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(x times a factor, float32 (M, rank), what `prepared` made of x, `count` or a tensor like it with zeros)."""
    import triton

    from trifold.kernels.weight_only.planes.gemm import multiply

    (tokens, in_features), rank = x.shape, factor.out_features
    config, tiles = choose(factor.kind.bits, tokens), factor.layout.tiles(in_features)
    blocks = triton.cdiv(tokens, config.bm) * triton.cdiv(rank, config.bn)
    parts = share(config.warps, blocks, tiles, processors(x.device))
    z = x.new_empty(tokens, rank, dtype=torch.float32)
    partial, own = workspace(z, parts, blocks)
    both = count.new_empty(len(own) + len(count))
    ready = prepared(x, both, *factor.wants(in_features))
    multiply[(blocks, parts)](
        *ready, *factor.tensors, z, z, partial, both, tokens, rank, tiles, factor.groups, **factor.constants(),
        BIAS=False, SHARED=parts > 1, **_tiles(config),
    )  # fmt: skip
    return z, ready, both[len(own) :]


def _tiles(config: Config) -> dict[str, int]:
    return {
        "BN": config.bn,
        "BM": config.bm,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": config.registers,
    }


def _rows(left: list[torch.Tensor]) -> int:
    """Of a matrix as it is, or of planes, whose second dimension that is."""
    return left[0].shape[1] if left[0].dim() == 3 else left[0].shape[0]


@low_rank_linear.register_fake
def _(x, base, right, left, kinds, places, bias):
    return x.new_empty(x.shape[0], _rows(left) if places is None else len(places))
