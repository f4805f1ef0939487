"""From words of bit planes to fp16 numbers, in registers.

LAYOUT is a `layout.Layout`. GRID says what codes stand for: "int"; "fp4_e2m1" or "fp8_e4m3", whose bits only have to be
moved; or the 16 values of a table, each with its bits in fp16. Two words make a register, and what comes out is a
register of two numbers.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""The interpreter knows no assembly, so there each unpacking has a twin in Triton's own operations."""


@triton.constexpr_function
def planes(layout):
    return len(layout.planes)


@triton.constexpr_function
def slots(layout):
    return layout.slots


@triton.constexpr_function
def words(layout, plane):
    return layout.words(plane) if plane < len(layout.planes) else 0


@triton.constexpr_function
def word(layout, plane, slot):
    return layout.places[plane][slot][0]


@triton.constexpr_function
def first(layout, plane, slot):
    """Whether a slot is in a word of this plane that no slot before it is in."""
    if plane >= len(layout.planes):
        return False
    places = layout.places[plane]
    return places[slot][0] not in [number for number, _ in places[:slot]]


@triton.constexpr_function
def is_lookup(grid):
    return not isinstance(grid, str)


@triton.constexpr_function
def unit(grid):
    """What an fp16 that comes out is multiplied by to be the number it stands for."""
    return 1.0 if is_lookup(grid) else {"int": 2.0**24, "fp4_e2m1": 2.0**14, "fp8_e4m3": 2.0**8}[grid]


@triton.constexpr_function
def _right(layout, plane, slot):
    """By how much words are shifted to the right, negative: to the left, to bring the slot's bits into place."""
    return layout.places[plane][slot][1] - layout.shifts[slot] - layout.offset(plane)


@triton.constexpr_function
def _mask(layout, plane, slot):
    return ((1 << layout.planes[plane]) - 1) << (layout.shifts[slot] + layout.offset(plane))


@triton.constexpr_function
def _moved(source, right, mask):
    """PTX: r |= (source >> right) & mask, in both halves."""
    way = "shr" if right > 0 else "shl"
    return f"{way}.b32 t, {source}, {abs(right)}; and.b32 t, t, {mask << 16 | mask}; or.b32 r, r, t;"


@triton.constexpr_function
def _fields(grid):
    """Of a float type: bits below its sign, and where an fp16 has the lowest of them."""
    return {"fp4_e2m1": (3, 9), "fp8_e4m3": (7, 7)}[grid]


@triton.constexpr_function
def _assembly(layout, slot, grid):
    """PTX from words of each plane, $1 .., to the numbers of a slot, $0."""
    if grid == "int":
        count = len(layout.planes)
        parts = [_moved(f"${i + 1}", _right(layout, i, slot), _mask(layout, i, slot)) for i in range(count)]
    else:
        below, lowest = _fields(grid)
        bit = layout.places[0][slot][1]
        rest = _moved("$1", bit - lowest, ((1 << below) - 1) << lowest)
        parts = [rest, _moved("$1", bit + below - 15, 0x8000)]
    return " ".join(["{ .reg .b32 t, r; mov.b32 r, 0;", *parts, "mov.b32 $0, r; }"])


@triton.constexpr_function
def _lookup(table):
    """PTX from words of four codes each, $4, to the numbers of all four slots, $0 .. $3.

    `prmt` takes four bytes out of eight, by the low three bits of each code; the fourth bit then chooses between the
    two halves of the table.
    """
    quads = [
        [sum((table[4 * i + j][1] >> shift & 255) << 8 * j for j in range(4)) for i in range(4)] for shift in (0, 8)
    ]
    lines = ["{ .reg .b32 c, v, m, a, b, q0, q1, x0, x1, y0, y1;"]
    for i in range(2):
        lines.append(f"shr.b32 c, $4, {16 * i}; and.b32 v, c, 0x7777;")
        lines.append("shr.b32 m, c, 3; and.b32 m, m, 0x1111; prmt.b32 m, 0xff00, 0, m;")
        for q, quad in enumerate(quads):
            lines.append(f"prmt.b32 a, {quad[0]}, {quad[1]}, v; prmt.b32 b, {quad[2]}, {quad[3]}, v;")
            lines.append(f"lop3.b32 q{q}, m, b, a, 0xca;")
        lines.append(f"prmt.b32 x{i}, q0, q1, 0x5140; prmt.b32 y{i}, q0, q1, 0x7362;")
    lines.append("prmt.b32 $0, x0, x1, 0x5410; prmt.b32 $1, x0, x1, 0x7632;")
    lines.append("prmt.b32 $2, y0, y1, 0x5410; prmt.b32 $3, y0, y1, 0x7632; }")
    return " ".join(lines)


@triton.constexpr_function
def _places(layout, plane, slot):
    """(bit, mask, offset) of a slot's part in a plane."""
    return layout.places[plane][slot][1], (1 << layout.planes[plane]) - 1, layout.offset(plane)


@triton.constexpr_function
def _shift(layout, slot):
    return layout.shifts[slot]


@triton.constexpr_function
def _entry(table, code):
    return table[code][0]


@triton.jit
def _part(p, LAYOUT: tl.constexpr, PLANE: tl.constexpr, J: tl.constexpr):
    BIT: tl.constexpr = _places(LAYOUT, PLANE, J)[0]
    MASK: tl.constexpr = _places(LAYOUT, PLANE, J)[1]
    OFFSET: tl.constexpr = _places(LAYOUT, PLANE, J)[2]
    return ((p.to(tl.int32) >> BIT) & MASK) << OFFSET


@triton.jit
def codes(p0, p1, p2, LAYOUT: tl.constexpr, J: tl.constexpr):
    """Words int16 of each plane -> codes int32 of slot J."""
    code = _part(p0, LAYOUT, 0, J)
    if planes(LAYOUT) > 1:
        code |= _part(p1, LAYOUT, 1, J)
    if planes(LAYOUT) > 2:
        code |= _part(p2, LAYOUT, 2, J)
    return code


@triton.jit
def values(code, GRID: tl.constexpr):
    """Codes int32 -> what they stand for, fp32, by plain arithmetic; a code of fp8 that is no number: +-480."""
    if is_lookup(GRID):
        value = tl.zeros(code.shape, dtype=tl.float32)
        for i in tl.static_range(16):
            value = tl.where(code == i, _entry(GRID, i), value)
    elif GRID == "int":
        value = code.to(tl.float32)
    else:
        BELOW: tl.constexpr = _fields(GRID)[0]
        LOWEST: tl.constexpr = _fields(GRID)[1]
        half = ((code & ((1 << BELOW) - 1)) << LOWEST) | ((code >> BELOW) << 15)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * unit(GRID)
    return value


@triton.jit
def lookup(p0, GRID: tl.constexpr):
    """Words int16 of four codes -> fp16 of each of the four slots, by assembly."""
    return tl.inline_asm_elementwise(
        _lookup(GRID), "=r,=r,=r,=r,r", [p0], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
    )


@triton.jit
def numbers(p0, p1, p2, LAYOUT: tl.constexpr, J: tl.constexpr, GRID: tl.constexpr):
    """Words int16 of each plane -> fp16 of slot J, the number over `unit`, integers times 2**shift."""
    if INTERPRETED:
        code = codes(p0, p1, p2, LAYOUT, J)
        if is_lookup(GRID):
            number = values(code, GRID).to(tl.float16)
        elif GRID == "int":
            number = (code << _shift(LAYOUT, J)).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            number = (values(code, GRID) * (1 / unit(GRID))).to(tl.float16)
    elif planes(LAYOUT) == 1:
        number = tl.inline_asm_elementwise(_assembly(LAYOUT, J, GRID), "=r,r", [p0], tl.float16, True, 2)
    elif planes(LAYOUT) == 2:
        number = tl.inline_asm_elementwise(_assembly(LAYOUT, J, GRID), "=r,r,r", [p0, p1], tl.float16, True, 2)
    else:
        number = tl.inline_asm_elementwise(_assembly(LAYOUT, J, GRID), "=r,r,r,r", [p0, p1, p2], tl.float16, True, 2)
    return number
