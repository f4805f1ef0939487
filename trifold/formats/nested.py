"""`split`, `sum` and `chain`: weights put together from parts, each in a format of its own, to any depth.

    split  weight  int32 (ceil(n * bits / 32),)   for each of the n rows (axis 0) or columns (axis 1) its part,
                                                  a bitstream; bits are as many as the last part's number needs
    sum    weight  int32 (0,)
    chain  weight  int32 (0,)
    all    parts.0.*, parts.1.*, ...              the tensors of the parts

`weight` is there in each of them, in one dimension, so that a loader without Trifold finds a shape that no dense
weight has, and stops.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trifold.core.canonical import Canonical, Chain, Nested, Split, Sum
from trifold.core.errors import CheckpointError
from trifold.formats.base import FORMATS, Format, Layout, Spec, describe, format_for, label, layout, pack, unpack
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for

_MOST_PARTS = 256


def index_bits(spec: Spec) -> int:
    """Bits that say which part a row or column belongs to."""
    return max(1, (len(spec["parts"]) - 1).bit_length())


def unpack_index(words: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The `weight` of a split -> (out,) or (in,) int64: the part of each row or column."""
    return unpack_bits(words[None], index_bits(spec), spec["shape"][spec["axis"]])[0].long()


def pack_index(index: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The inverse."""
    return pack_bits(index.to(torch.uint8)[None], index_bits(spec))[0]


def _below(number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"parts.{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class NestedFormat(Format):
    """What the three have in common. name: of the format. kind: the canonical that it stores."""

    name: str
    kind: type[Nested]

    def holds(self, canonical: Canonical) -> bool:
        if not isinstance(canonical, self.kind):
            return False
        try:
            return all(format_for(part) for part in canonical.parts) and len(canonical.parts) <= _MOST_PARTS
        except TypeError:
            return False

    def describe(self, canonical: Canonical) -> Spec:
        assert isinstance(canonical, Nested)
        parts = [describe(part) for part in canonical.parts]
        return {"format": self.name, "shape": list(canonical.shape), **self._own(canonical), "parts": parts}

    def _own(self, canonical: Canonical) -> dict[str, Any]:
        return {}

    def label(self, spec: Spec) -> str:
        return f"{self.name}({' | '.join(map(label, spec['parts']))})"

    @abstractmethod
    def _fits(self, spec: Spec, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether parts of these shapes make up the whole."""

    def _words(self, spec: Spec) -> int:
        return 0

    def layout(self, spec: Spec) -> Layout:
        shapes = [part["shape"] for part in spec["parts"]]
        if not shapes or not self._fits(spec, shapes):
            raise CheckpointError(f"a {self.name} of shape {spec['shape']} cannot have parts of shapes {shapes}")
        found: Layout = {"weight": ((self._words(spec),), torch.int32)}
        for number, part in enumerate(spec["parts"]):
            found.update({f"parts.{number}.{name}": entry for name, entry in layout(part).items()})
        return found

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Nested)
        tensors = {"weight": torch.empty(0, dtype=torch.int32)}
        for number, part in enumerate(canonical.parts):
            tensors.update({f"parts.{number}.{name}": tensor for name, tensor in pack(part).items()})
        return tensors

    def _parts(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> tuple[Canonical, ...]:
        return tuple(unpack(_below(number, tensors), part) for number, part in enumerate(spec["parts"]))


class SplitFormat(NestedFormat):
    name, kind = "split", Split

    def _own(self, canonical: Canonical) -> dict[str, Any]:
        assert isinstance(canonical, Split)
        return {"axis": canonical.axis}

    def label(self, spec: Spec) -> str:
        divided = "rows" if spec["axis"] == 0 else "columns"
        shares = (f"{part['shape'][spec['axis']]} {divided} {label(part)}" for part in spec["parts"])
        return f"split({' | '.join(shares)})"

    def _fits(self, spec: Spec, shapes: Sequence[Sequence[int]]) -> bool:
        axis, whole = spec["axis"], spec["shape"]
        divided = sum(shape[axis] for shape in shapes) == whole[axis]
        return divided and all(shape[1 - axis] == whole[1 - axis] for shape in shapes)

    def _words(self, spec: Spec) -> int:
        return words_for(spec["shape"][spec["axis"]], index_bits(spec))

    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        assert isinstance(canonical, Split)
        return {**super().pack(canonical), "weight": pack_index(canonical.index, {"parts": canonical.parts})}

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Split:
        return Split(spec["axis"], unpack_index(tensors["weight"], spec), self._parts(tensors, spec))


class SumFormat(NestedFormat):
    name, kind = "sum", Sum

    def _fits(self, spec: Spec, shapes: Sequence[Sequence[int]]) -> bool:
        return all(list(shape) == list(spec["shape"]) for shape in shapes)

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Sum:
        return Sum(self._parts(tensors, spec))


class ChainFormat(NestedFormat):
    name, kind = "chain", Chain

    def label(self, spec: Spec) -> str:
        inner = min((part["shape"][0] for part in spec["parts"][1:]), default=None)
        parts = f"({' | '.join(map(label, spec['parts']))})"
        return f"chain{parts}" if inner is None else f"rank {inner} {parts}"

    def _fits(self, spec: Spec, shapes: Sequence[Sequence[int]]) -> bool:
        inner = all(a[1] == b[0] for a, b in itertools.pairwise(shapes))
        return inner and [shapes[0][0], shapes[-1][1]] == list(spec["shape"])

    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Chain:
        return Chain(self._parts(tensors, spec))


for _format in (SplitFormat(), SumFormat(), ChainFormat()):
    FORMATS.register(_format.name)(_format)
