"""Canonical tensors: what a method decided about a weight, independent of how it is stored.

Leaves are `Dense`, `Identity`, `Quantized` and `LowRank`; `Sparse`, `Chain`, `Sum` and `Split` nest them, and
`RoundedInput` adds what happens to the activations that meet one of them. Every one knows the (out, in) shape of the
weight it stands for, and `dequantize()` gives that weight in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from trifold.core.inputs import InputScheme
from trifold.core.pattern import Pattern
from trifold.core.ranges import expand_groups
from trifold.core.scheme import Scheme


class Canonical(ABC):
    """A weight matrix as a method left it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The weight, (out, in) float32."""


def _two(shape: torch.Size) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"a weight has two dimensions, not shape {tuple(shape)}")
    return shape[0], shape[1]


@dataclass(frozen=True, eq=False)
class Dense(Canonical):
    """values: (out, in), any float dtype."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return _two(self.values.shape)

    def dequantize(self) -> torch.Tensor:
        return self.values.float()


@dataclass(frozen=True, eq=False)
class Identity(Canonical):
    """What leaves its input as it is: (size, size), nothing stored. Rows of a factor that are those of another."""

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def dequantize(self) -> torch.Tensor:
        return torch.eye(self.size)


@dataclass(frozen=True, eq=False)
class Quantized(Canonical):
    """(codes - zero_point) * scale, or table[codes] * scale.

    codes: (out, in) uint8. scale: `scheme.scale_shape`, in `scheme.scale_dtype`. zero_point: the same shape,
    uint8, in `scheme.scale_dtype` if it is real; None if the scheme is symmetric, as a table always is.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        expected = self.scheme.scale_shape(*_two(self.codes.shape))
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale has shape {tuple(self.scale.shape)}, the scheme says {expected}")
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError("a zero_point goes with an asymmetric scheme, and only with it")

    @property
    def shape(self) -> tuple[int, int]:
        return _two(self.codes.shape)

    def dequantize(self) -> torch.Tensor:
        width = self.scheme.group_width(self.shape[1])
        table, zero = self.scheme.table, self.zero_point
        values = self.codes.float() if table is None else table.decode(self.codes)
        if zero is not None:
            values -= expand_groups(zero.float(), self.shape, width)
        elif table is None:
            values -= self.scheme.midpoint
        values *= expand_groups(self.scale.float(), self.shape, width)
        return values


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Rows of several weights below each other, of one scheme with scales for each row."""
    scale = torch.cat([part.scale for part in parts])
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    codes = torch.cat([part.codes for part in parts])
    return Quantized(codes, scale, torch.cat(zeros) if zeros else None, parts[0].scheme)


@dataclass(frozen=True, eq=False)
class LowRank(Canonical):
    """left @ right. left: (out, rank), right: (rank, in)."""

    left: torch.Tensor
    right: torch.Tensor

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"ranks differ: left {tuple(self.left.shape)}, right {tuple(self.right.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dequantize(self) -> torch.Tensor:
        return self.left.float() @ self.right.float()


@dataclass(frozen=True, eq=False)
class Sparse(Canonical):
    """`values` where `mask` is true, exactly zero elsewhere.

    mask: (out, in) bool. pattern: "unstructured", "N:M" (at most N of M consecutive inputs kept) or "1xG"
    (groups of G consecutive inputs kept or dropped whole; the last group of a row may be shorter).
    """

    values: Canonical
    mask: torch.Tensor
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        if tuple(self.mask.shape) != self.values.shape or self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool of shape {self.values.shape}")
        if not self._holds():
            raise ValueError(f"mask does not follow the pattern {self.pattern!r}")

    def _holds(self) -> bool:
        pattern = Pattern.parse(self.pattern)
        mask = self.mask[:1] if self.mask.stride(0) == 0 else self.mask  # one row stands for all
        if pattern.size == 1:
            return True
        if not pattern.keep:
            return torch.equal(mask, pattern.expand(mask[:, :: pattern.size], mask.shape[1]))
        counts = torch.zeros(mask[:, :: pattern.size].shape, dtype=torch.int16, device=mask.device)
        for place in range(pattern.size):
            there = mask[:, place :: pattern.size]
            counts[:, : there.shape[1]] += there
        return bool((counts <= pattern.keep).all())

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def dequantize(self) -> torch.Tensor:
        return self.values.dequantize().masked_fill(~self.mask, 0.0)

    def normalized(self) -> Sparse:
        """The same weight, with codes and values 0 where the mask drops them, and scale 1 and zero-point 0 of groups
        that are dropped whole: what a format that stores survivors alone gives back."""
        match self.values:
            case Dense(values):
                return replace(self, values=Dense(values.masked_fill(~self.mask, 0.0)))
            case Quantized(codes, scale, zero, scheme):
                codes = codes.masked_fill(~self.mask, 0)
                if self.pattern == f"1x{scheme.group_size}":
                    gone = ~self.mask[:, :: scheme.group_width(self.shape[1])]
                    scale = scale.masked_fill(gone, 1.0)
                    zero = None if zero is None else zero.masked_fill(gone, 0)
                return replace(self, values=Quantized(codes, scale, zero, scheme))
        raise TypeError(f"a sparse {type(self.values).__name__} has no such form")


class Nested(Canonical):
    """Put together from parts."""

    parts: tuple[Canonical, ...]


@dataclass(frozen=True, eq=False)
class Chain(Nested):
    """A product, outermost factor first: `parts[0] @ parts[1] @ ...`."""

    parts: tuple[Canonical, ...]

    def __post_init__(self) -> None:
        for a, b in zip(self.parts, self.parts[1:], strict=False):
            if a.shape[1] != b.shape[0]:
                raise ValueError(f"factors of shapes {a.shape} and {b.shape} do not chain")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], self.parts[-1].shape[1]

    def dequantize(self) -> torch.Tensor:
        return reduce(torch.matmul, (part.dequantize() for part in self.parts))


@dataclass(frozen=True, eq=False)
class Sum(Nested):
    """A sum of weights of one shape, such as a compressed weight and its low-rank residual."""

    parts: tuple[Canonical, ...]

    def __post_init__(self) -> None:
        if len({part.shape for part in self.parts}) != 1:
            raise ValueError(f"summands have different shapes: {[part.shape for part in self.parts]}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def dequantize(self) -> torch.Tensor:
        return reduce(torch.add, (part.dequantize() for part in self.parts))


@dataclass(frozen=True, eq=False)
class Split(Nested):
    """Rows (axis 0) or columns (axis 1) divided among parts.

    index: (out,) or (in,) int64; position i of the weight is the next unused row or column of part index[i].
    """

    axis: int
    index: torch.Tensor
    parts: tuple[Canonical, ...]

    def __post_init__(self) -> None:
        counts = torch.bincount(self.index, minlength=len(self.parts)).tolist()
        sizes = [part.shape[self.axis] for part in self.parts]
        if self.axis not in (0, 1) or counts != sizes or len({part.shape[1 - self.axis] for part in self.parts}) != 1:
            raise ValueError(f"index gives the parts {counts} places on axis {self.axis}, they have {sizes}")

    @property
    def shape(self) -> tuple[int, int]:
        other = self.parts[0].shape[1 - self.axis]
        return (len(self.index), other) if self.axis == 0 else (other, len(self.index))

    def dequantize(self) -> torch.Tensor:
        weight = torch.empty(self.shape, device=self.index.device)
        for number, part in enumerate(self.parts):
            places = (self.index == number).nonzero().squeeze(1)
            weight.index_copy_(self.axis, places, part.dequantize().to(weight.device))
        return weight


@dataclass(frozen=True, eq=False)
class RoundedInput(Canonical):
    """A weight whose activations are rounded before they meet it; not a nested one, whose parts say so themselves.

    scale: (1,) float32, of a static scheme; None of a dynamic one.
    """

    weight: Canonical
    scheme: InputScheme
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.scale is not None) != self.scheme.static:
            raise ValueError("a scale goes with a static input scheme, and only with it")
        if isinstance(self.weight, Nested | RoundedInput):
            raise ValueError(f"the parts of a {type(self.weight).__name__} round their inputs, not the whole")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def dequantize(self) -> torch.Tensor:
        return self.weight.dequantize()


def with_rounded_input(weight: Canonical, scheme: InputScheme, absmax: torch.Tensor | None = None) -> Canonical:
    """Let activations be rounded where they meet rounded weights; what is kept in 16 bits meets them as they are.

    So a dense or low-rank part of a sum or a split sees x itself, each column part of a split has a scale of its
    own, and of a chain only the last factor sees x. absmax: (in,), largest |x| of each feature in calibration,
    for a static scheme.
    """
    match weight:
        case Dense() | Identity() | LowRank():
            return weight
        case Split(axis, index, parts):
            own = [absmax if absmax is None or axis == 0 else absmax[index == i] for i in range(len(parts))]
            inside = (with_rounded_input(p, scheme, a) for p, a in zip(parts, own, strict=True))
            return Split(axis, index, tuple(inside))
        case Sum(parts):
            return Sum(tuple(with_rounded_input(part, scheme, absmax) for part in parts))
        case Chain(parts):
            return Chain((*parts[:-1], with_rounded_input(parts[-1], scheme, absmax)))
    if not scheme.static:
        return RoundedInput(weight, scheme)
    if absmax is None:
        raise ValueError("a static input scheme needs what calibration saw")
    return RoundedInput(weight, scheme, scheme.static_scale(absmax))
