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

    def activations(self, in_features: int) -> tuple[int, int, int]:
        """What `prepared` is told of inputs that meet it."""
        step = self.layout.shifts[1] if self.kind.grid == "int" else 0
        return self.layout.tiles(in_features) * self.layout.tile, self.flush, step


REGISTERS = 255
"""Of a thread; two loops need more than the one that tiles were chosen for."""
_ABSENT = Kind(4, 128, "int", 0.0, False)


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

    Each matrix is its planes, scale and zero, or one matrix of x's dtype; kinds: of base, right and left, each on a line
    of its own, a `Kind`'s text, PLAIN, or for no base nothing. With places (out,) int64 outputs places[:rank] are x right^T itself, and the others
    those of left in their order. Sums of one shape on one GPU are always added in the same order.
    """
    import triton

    from trifold.kernels.low_rank.kernel import finish
    from trifold.kernels.weight_only.planes.gemm import multiply

    (tokens, in_features), many = x.shape, processors(x.device)
    base_kind, right_kind, left_kind = kinds.split("\n")
    first = None if right_kind == PLAIN else _Planes.of(right, right_kind)
    second = None if left_kind == PLAIN else _Planes.of(left, left_kind)
    whole = _Planes.of(base, base_kind) if base_kind else None
    rows, rank = _rows(left), right[0].shape[0] if first is None else first.tensors[3].shape[1]
    y = x.new_empty(tokens, rows if places is None else len(places))
    with torch.cuda.device_of(x):
        config = choose((whole or second or _Planes.of([x, x], _ABSENT.text)).kind.bits, tokens)
        blocks = triton.cdiv(tokens, config.bm) * triton.cdiv(rows, config.bn)
        parts = 1
        if whole is not None:
            parts = share(config.warps, blocks, whole.layout.tiles(in_features), many)
        partial, count = workspace(y, parts, blocks)
        z, ready = x, None
        if first is None:
            z = torch.nn.functional.linear(x, right[0])
        else:
            own = choose(first.kind.bits, tokens)
            pieces = triton.cdiv(tokens, own.bm) * triton.cdiv(rank, own.bn)
            tiles = first.layout.tiles(in_features)
            several = share(own.warps, pieces, tiles, many)
            z = x.new_empty(tokens, rank, dtype=torch.float32)
            sums, counts = workspace(z, several, pieces)
            both = x.new_empty(len(counts) + len(count), dtype=torch.int32)
            counts, count = both[: len(counts)], both[len(counts) :]
            ready = prepared(x, both, *first.activations(in_features))
            multiply[(pieces, several)](
                *ready, *first.tensors, first.tensors[3], z, sums, counts, tokens, rank, tiles, len(first.tensors[3]),
                **first.constants(), BIAS=False, SHARED=several > 1, **_tiles(own),
            )  # fmt: skip
        if whole is not None and (
            first is None or whole.activations(in_features) != first.activations(in_features) or ready is None
        ):
            ready = prepared(x, count, *whole.activations(in_features))
        extra = 0 if places is None else triton.cdiv(tokens, config.bm) * triton.cdiv(rank, config.bn)
        main, after = whole or _Planes.of([y, y], _ABSENT.text), second or _Planes.of([left[0], left[0]], _ABSENT.text)
        finish[(blocks + extra, parts)](
            *(ready or (y, y, y)), *main.tensors, z, *after.tensors, y if places is None else places,
            y if bias is None else bias, y, partial, count,
            tokens, y.shape[1], rows, main.layout.tiles(in_features), len(main.tensors[3]), rank,
            after.layout.tiles(rank), len(after.tensors[3]),
            BASE=whole is not None, **main.constants(), PACKED=second is not None, **after.constants("LEFT_"),
            PLACED=places is not None, BIAS=bias is not None, SHARED=parts > 1, **_tiles(config._replace(registers=REGISTERS)),
        )  # fmt: skip
    return y


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
