"""Decided weights as functions of parameters that start at zero, where they are what was decided, bit for bit.

What is stored rounded is rounded in the forward pass and not in the backward pass (straight through). Parameters have
no unit: changes of codes and zero-points count in codes, those of scales in shares of the scale, those of plain numbers
in 64ths of the matrix' root mean square. So one learning rate fits layers of any size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import torch
from torch import nn

from trifold.core.canonical import Canonical, Chain, Dense, LowRank, Quantized, Sparse, Split, Sum
from trifold.core.ranges import expand_groups
from trifold.core.row_scales import from_row_scales, to_row_scales
from trifold.core.scheme import SCALE_DTYPES

_DENSE_STEP = 1 / 64

WEIGHTS, SCALES, ZEROS = "weights", "scales", "zeros"
"""Kinds of parameters."""


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, exactly, with the gradient of `value`."""
    return rounded.detach() + (value - value.detach())


class Tunable(nn.Module):
    """A canonical tensor whose parameters may be tuned. kinds: which of them are."""

    weights: nn.Parameter | None
    scales: nn.Parameter | None
    zeros: nn.Parameter | None

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """(out, in) float32, differentiable."""

    @abstractmethod
    def canonical(self) -> Canonical:
        """What is decided with the parameters as they are; `dequantize()` gives `weight()`."""

    def of_kind(self, kind: str) -> Iterator[nn.Parameter]:
        """The parameters of one kind, here and below."""
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[2] == kind:
                yield parameter

    def _parameter(self, kind: str, kinds: frozenset[str], like: torch.Tensor | None) -> None:
        """Zeros of a shape, if that kind is tuned and the thing exists."""
        wanted = like is not None and kind in kinds
        value = nn.Parameter(torch.zeros(like.shape, device=like.device)) if wanted else None  # type: ignore[union-attr]
        self.register_parameter(kind, value)


class TunableDense(Tunable):
    """Numbers as they are stored, in their dtype."""

    def __init__(self, decided: Dense, kinds: frozenset[str]) -> None:
        super().__init__()
        self.decided, self.step = decided, _DENSE_STEP * decided.values.float().square().mean().sqrt()
        self._parameter(WEIGHTS, kinds, decided.values)

    def _values(self) -> torch.Tensor:
        values = self.decided.values.float()
        return values if self.weights is None else values + self.step * self.weights

    def weight(self) -> torch.Tensor:
        values = self._values()
        return straight_through(values, values.to(self.decided.values.dtype).float())

    def canonical(self) -> Dense:
        return Dense(self._values().detach().to(self.decided.values.dtype))


class TunableQuantized(Tunable):
    """Codes, of integer grids, scales and zero-points."""

    def __init__(self, decided: Quantized, kinds: frozenset[str], kept: torch.Tensor | None = None) -> None:
        """kept: (out, groups) bool, of groups that have a scale, if not all."""
        super().__init__()
        self.decided, scheme, self._kept = decided, decided.scheme, kept
        self._two_levels = False
        if kept is not None and decided.scale.dtype == torch.float32:
            self._two_levels = from_row_scales(decided.scale, kept) is not None
        self._parameter(WEIGHTS, kinds, decided.codes if scheme.table is None else None)
        self._parameter(SCALES, kinds, decided.scale)
        self._parameter(ZEROS, kinds, decided.zero_point)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scales and zero-points as stored, in float32, differentiable."""
        decided, scheme = self.decided, self.decided.scheme
        dtype = SCALE_DTYPES[scheme.scale_dtype]
        codes, scale = decided.codes.float(), decided.scale.float()
        zero = None if decided.zero_point is None else decided.zero_point.float()
        if self.weights is not None:
            moved = (codes + self.weights).clamp(0, scheme.max_code)
            codes = straight_through(moved, moved.round())
        if self.scales is not None:
            grown = scale * self.scales.clamp(-0.5, 1.0).add(1)
            rounded = grown.to(dtype).float()
            rounded = torch.where(rounded > 0, rounded, scale)
            if self._two_levels and self._kept is not None:
                rounded = to_row_scales(rounded, self._kept)
            scale = straight_through(grown, rounded)
        if self.zeros is not None and zero is not None:
            moved = zero + self.zeros
            if scheme.zero_point == "real":
                zero = straight_through(moved, moved.to(dtype).float())
            else:
                moved = moved.clamp(0, scheme.max_code)
                zero = straight_through(moved, moved.round())
        return codes, scale, zero

    def weight(self) -> torch.Tensor:
        decided, scheme = self.decided, self.decided.scheme
        codes, scale, zero = self._parts()
        width = scheme.group_width(decided.shape[1])
        each = expand_groups(scale, decided.shape, width)
        if scheme.table is not None:
            return scheme.table.decode(decided.codes) * each
        offset = scheme.midpoint if zero is None else expand_groups(zero, decided.shape, width)
        return (codes - offset) * each

    def canonical(self) -> Quantized:
        codes, scale, zero = (None if part is None else part.detach() for part in self._parts())
        decided = self.decided
        return replace(
            decided,
            codes=decided.codes if codes is None else codes.to(torch.uint8),
            scale=decided.scale if scale is None else scale.to(decided.scale.dtype),
            zero_point=None if zero is None or decided.zero_point is None else zero.to(decided.zero_point.dtype),
        )


class TunableSparse(Tunable):
    """The mask stays as it is."""

    def __init__(self, decided: Sparse, kinds: frozenset[str]) -> None:
        super().__init__()
        self.decided, self.values = decided, self._inside(decided, kinds)

    @staticmethod
    def _inside(decided: Sparse, kinds: frozenset[str]) -> Tunable:
        values = decided.values
        if not isinstance(values, Quantized) or decided.pattern != f"1x{values.scheme.group_size}":
            return tunable(values, kinds)
        return TunableQuantized(values, kinds, decided.mask[:, :: values.scheme.group_width(decided.shape[1])])

    def weight(self) -> torch.Tensor:
        return self.values.weight() * self.decided.mask

    def canonical(self) -> Sparse:
        return replace(self.decided, values=self.values.canonical()).normalized()


class TunableLowRank(Tunable):
    """Both factors."""

    def __init__(self, decided: LowRank, kinds: frozenset[str]) -> None:
        super().__init__()
        self.left, self.right = (TunableDense(Dense(factor), kinds) for factor in (decided.left, decided.right))

    def weight(self) -> torch.Tensor:
        return self.left.weight() @ self.right.weight()

    def canonical(self) -> LowRank:
        return LowRank(self.left.canonical().values, self.right.canonical().values)


class TunableNested(Tunable):
    """Parts, put together as they were."""

    def __init__(self, decided: Split | Sum | Chain, kinds: frozenset[str]) -> None:
        super().__init__()
        self.decided = decided
        self.pieces = [tunable(part, kinds) for part in decided.parts]
        self.parts = nn.ModuleList(self.pieces)

    def weight(self) -> torch.Tensor:
        parts = [piece.weight() for piece in self.pieces]
        match self.decided:
            case Sum():
                return reduce(torch.add, parts)
            case Chain():
                return reduce(torch.matmul, parts)
            case Split(axis, index, _):
                joined = torch.cat(parts, dim=axis)
                return joined.index_select(axis, torch.argsort(torch.argsort(index, stable=True)))

    def canonical(self) -> Canonical:
        return replace(self.decided, parts=tuple(piece.canonical() for piece in self.pieces))


def tunable(decided: Canonical, kinds: frozenset[str]) -> Tunable:
    """Raises TypeError for what cannot be tuned: a weight whose input is rounded."""
    match decided:
        case Dense():
            return TunableDense(decided, kinds)
        case Quantized():
            return TunableQuantized(decided, kinds)
        case Sparse():
            return TunableSparse(decided, kinds)
        case LowRank():
            return TunableLowRank(decided, kinds)
        case Split() | Sum() | Chain():
            return TunableNested(decided, kinds)
    raise TypeError(f"a {type(decided).__name__} cannot be tuned")
