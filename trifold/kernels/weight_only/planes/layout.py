"""The runtime layout of codes for GPUs: planes of 8, 4, 2 and 1 bits in 16-bit words, tile by tile.

A width is a sum of planes (3 = 2 + 1, 6 = 4 + 2), the lowest bits of a code in the first. Along the inputs a weight
is cut into tiles, and a tile into slots of 32 inputs: slot j of a tile holds its inputs 32 j .. 32 j + 31. A word of a
plane of b bits holds 16 / b slots of one input of 32, so that one mask takes a slot out of all words at once, two
words of neighbouring inputs to a register. What the mask leaves is an fp16 number as it stands, `code * 2**shift *
2**-24`, a subnormal, exact up to ten bits; activations of a slot are divided by its `2**shift` in advance. No
conversion, no subtraction, no shuffle.

A plane is int16 (tiles, rows, 32): the part of a tile that some rows need is contiguous. The inputs are padded with
code 0 to whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SLOT = 32
"""Inputs of a slot: what one matrix instruction or two take."""
_WORD = 16
_EXACT = 10  # bits of an fp16 fraction
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Layout:
    """Where the bits of a code of some width lie.

    planes: bits of each. slots: of a tile. shifts: by slot, the bit of an fp16 fraction at which its codes begin.
    places: by plane and slot, (which of the plane's words of a tile, bit of that word).
    """

    bits: int
    planes: tuple[int, ...]
    slots: int
    shifts: tuple[int, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def tile(self) -> int:
        """Inputs of a tile."""
        return self.slots * SLOT

    def tiles(self, in_features: int) -> int:
        return -(-in_features // self.tile)

    def words(self, plane: int) -> int:
        """Words of one input of a slot, of a tile."""
        return self.slots * self.planes[plane] // _WORD

    def offset(self, plane: int) -> int:
        """The lowest bit of a code that this plane holds."""
        return sum(self.planes[:plane])


def layout_of(bits: int) -> Layout:
    """The layout of codes of 1..8 bits."""
    return _LAYOUTS[bits]


def _layout(bits: int) -> Layout:
    planes = _PLANES[bits]
    slots = _WORD // planes[-1]
    step = planes[0] if 8 - planes[0] + bits <= _EXACT else 8
    shifts = tuple(j * step % 8 for j in range(slots))
    offsets = [sum(planes[:i]) for i in range(len(planes))]
    places = [_places(width, [s + offset for s in shifts]) for width, offset in zip(planes, offsets, strict=True)]
    return Layout(bits, planes, slots, shifts, tuple(places))


def _places(width: int, wanted: list[int]) -> tuple[tuple[int, int], ...]:
    """Gives each slot a word and a bit, so that few different shifts bring the bits to where they are wanted."""
    per_word = _WORD // width
    places: list[tuple[int, int]] = []
    for word in range(len(wanted) // per_word):
        slots = range(word * per_word, (word + 1) * per_word)
        free, found = set(range(0, _WORD, width)), dict[int, int]()
        while free:
            by_shift: dict[int, dict[int, int]] = {}
            for shift in sorted(range(-_WORD, _WORD), key=abs):
                taken: dict[int, int] = {}
                for j in slots:
                    bit = wanted[j] + shift
                    if j not in found and bit in free and bit not in taken.values():
                        taken[j] = bit
                by_shift[shift] = taken
            best = max(by_shift.values(), key=len)
            found.update(best)
            free -= set(best.values())
        places += [(word, found[j]) for j in slots]
    return tuple(places)


_LAYOUTS = {bits: _layout(bits) for bits in _PLANES}


def pack_planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """codes (rows, in) uint8, each below 2**bits -> planes int16 (tiles of the plane, rows, 32)."""
    layout, (rows, count) = layout_of(bits), codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % layout.tile))
    slots = padded.reshape(rows, -1, layout.slots, SLOT).permute(2, 1, 0, 3)  # slot, tile, row, input
    planes = []
    for plane, width in enumerate(layout.planes):
        words = torch.zeros(slots.shape[1], layout.words(plane), rows, SLOT, dtype=torch.int16, device=codes.device)
        for j, (word, bit) in enumerate(layout.places[plane]):
            part = slots[j].to(torch.int16) >> layout.offset(plane) & (1 << width) - 1
            words[:, word] |= part << bit
        planes.append(words.reshape(-1, rows, SLOT))
    return planes


def unpack_planes(
    planes: list[torch.Tensor], bits: int, count: int, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """The inverse, of rows start..stop-1: (rows, count) uint8."""
    layout = layout_of(bits)
    parts = [plane[:, start:stop].unflatten(0, (-1, layout.words(i))) for i, plane in enumerate(planes)]
    tiles, _, rows, _ = parts[0].shape
    codes = torch.zeros(rows, tiles, layout.slots, SLOT, dtype=torch.uint8, device=planes[0].device)
    for plane, width in enumerate(layout.planes):
        for j, (word, bit) in enumerate(layout.places[plane]):
            part = (parts[plane][:, word] >> bit & (1 << width) - 1) << layout.offset(plane)
            codes[:, :, j] |= part.transpose(0, 1).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count].contiguous()
