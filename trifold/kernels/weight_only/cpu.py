"""Compiled products on CPUs: codes become numbers in registers, a group's sum is scaled once.

Activations keep their precision: bfloat16 ones are multiplied as such (AVX512-BF16; AMX for several tokens) or exactly
widened, float16 ones are widened, sums are float32. Integer weights are exact in bfloat16 before they are scaled, so
nothing is rounded but sums and the result. `kernels/native/layout.h` has the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear, pad

from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats.base import Spec
from trifold.formats.bitstream import pack_bits, words_for
from trifold.formats.quantized import scheme_of
from trifold.kernels import native
from trifold.kernels.op import Call, Op, Tensors
from trifold.kernels.rows import row_blocks, zero_points

ROWS = 16  # of a tile
BLOCK = 16  # columns
_MIDPOINT, _INTEGER, _REAL, _TABLE = range(4)
_Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, Sequence[int], int]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DENSE_FROM = {
    "amx": {torch.bfloat16: 2048, torch.float32: 128},
    "avx512_bf16": {torch.bfloat16: 16, torch.float32: 128},
    "avx512": {torch.bfloat16: 64, torch.float32: 128},
    "avx2": {torch.bfloat16: 32, torch.float32: 32},
    "portable": {torch.bfloat16: 16, torch.float32: 16},
}
"""Number of tokens from which weights rounded to the dtype of the activations are faster."""
_ROUNDS_ITSELF = {("avx512_bf16", torch.bfloat16)}
"""Where the compiled product does that; elsewhere tiles are dequantised for the platform's product."""


def _shape(spec: Spec) -> tuple[int, int, int, int, int]:
    """Rows, columns, group, kind of zero, whether scales are float32."""
    scheme = scheme_of(spec)
    rows, columns = spec["shape"]
    if scheme.table is not None:
        kind = _TABLE
    elif scheme.symmetric:
        kind = _MIDPOINT
    else:
        kind = _INTEGER if scheme.zero_point == "integer" else _REAL
    return rows, columns, scheme.group_width(columns), kind, int(scheme.scale_dtype != "bfloat16")


def _tiled(values: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows or 1, groups) -> (tiles, groups, ROWS), filled with zeros."""
    values = pad(values.expand(rows, -1), (0, 0, 0, -rows % ROWS))
    return values.reshape(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _rows(tiled: torch.Tensor, scheme: Scheme, rows: int) -> torch.Tensor:
    """The inverse."""
    values = tiled.transpose(1, 2).reshape(-1, tiled.shape[1])[:rows]
    return values[:1].clone() if scheme.group_size == "tensor" else values.contiguous()


class Compiled(Op):
    """Integers of 1 to 8 bits, tables of 16 values; float32, bfloat16 and float16 activations."""

    replaces = True
    gathers = True

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.name = f"weight_only.cpu_{variant}"  # type: ignore[misc]

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = scheme_of(spec)
        if dtype not in _FLOATS:
            return f"takes float32, bfloat16 and float16 activations, not {dtype}"
        if scheme.table is not None and len(scheme.table.values) != 16:
            return f"grid={scheme.grid!r} has not 16 values"
        loaded = native.load(self.variant, scheme.bits)
        return loaded if isinstance(loaded, str) else None

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        scheme, shape = scheme_of(spec), _shape(spec)
        rows, columns, group = shape[:3]
        blocks = columns // group * -(-group // BLOCK) + -(-(columns % group) // BLOCK)
        codes = torch.empty(-(-rows // ROWS) * blocks * scheme.bits * 32, dtype=torch.uint8)
        library(self.variant, scheme.bits).pack(shape, tensors["weight"].contiguous(), codes)
        scale, zero = tensors["weight_scale"], zero_points(tensors, spec, slice(0, rows))
        wide = torch.float32 if shape[4] else torch.bfloat16
        kept = {name: t for name, t in tensors.items() if not name.startswith("weight")}
        made = {"codes": codes, "scale": _tiled(scale.to(wide), rows), **kept}
        if zero is not None:
            made["zero"] = _tiled(zero.to(torch.uint8 if shape[3] == _INTEGER else wide), rows)
        if scheme.table is not None:
            made["table"] = torch.tensor(scheme.table.values, dtype=torch.float32, device="cpu")
        return made

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        scheme, shape = scheme_of(spec), _shape(spec)
        rows, columns = shape[:2]
        words = torch.zeros(rows, words_for(columns, scheme.bits), dtype=torch.int32)
        library(self.variant, scheme.bits).restore(shape, words, tensors["codes"])
        kept = {n: t for n, t in tensors.items() if n not in ("codes", "scale", "zero", "table")}
        dtype = SCALE_DTYPES[scheme.scale_dtype]
        made = {"weight": words, "weight_scale": _rows(tensors["scale"], scheme, rows).to(dtype), **kept}
        if "zero" in tensors:
            zero = _rows(tensors["zero"], scheme, rows)
            integer = shape[3] == _INTEGER
            made["weight_zero_point"] = pack_bits(zero.T, scheme.bits).T.contiguous() if integer else zero.to(dtype)
        return made

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        first = start - start % ROWS
        wanted = dtype if dtype in native.DTYPES else torch.float32
        weight = torch.ops.trifold.dequantize_packed(*stored(tensors, spec), self.variant, first, stop, wanted)
        return weight.t()[start - first :].to(dtype)

    def gather(self, tensors: Tensors, spec: Spec, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if int(rows.min()) < 0 or int(rows.max()) >= spec["shape"][0]:
            raise IndexError(f"row {int(rows.min())}..{int(rows.max())} of a table with {spec['shape'][0]}")
        wanted = dtype if dtype in native.DTYPES else torch.float32
        found = torch.ops.trifold.gather_packed(rows.contiguous(), *stored(tensors, spec), self.variant, wanted)
        return found.to(dtype)

    def bind(self, tensors: Tensors, spec: Spec) -> Call:
        codes, scale, zero, table, shape, bits = stored(tensors, spec)
        product = library(self.variant, bits).bind(tuple(shape), codes, scale, zero, table)
        few = _DENSE_FROM[self.variant]

        def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if len(x) < few.get(x.dtype, 0):
                return product(x.contiguous(), None if bias is None else bias.contiguous())
            return self.run(x, tensors, spec, bias)

        return call

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dtype == torch.float16:
            return self.run(x.float(), tensors, spec, None if bias is None else bias.float()).half()
        y: torch.Tensor = torch.ops.trifold.packed_linear(x, bias, *stored(tensors, spec), self.variant)
        return y


def library(variant: str, bits: int) -> native.Library:
    loaded = native.load(variant, bits)
    assert isinstance(loaded, native.Library), loaded
    return loaded


def stored(tensors: Tensors, spec: Spec) -> _Stored:
    """What the custom operators take of a weight: tensors, shape, bits."""
    return (
        tensors["codes"],
        tensors["scale"],
        tensors.get("zero"),
        tensors.get("table"),
        _shape(spec),
        spec["bits"],
    )


_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, Tensor? table, int[] shape, int bits, str variant"


def _packed_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    table: torch.Tensor | None,
    shape: Sequence[int],
    bits: int,
    variant: str,
) -> torch.Tensor:
    product, size = library(variant, bits), tuple(shape)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    rounded = x.shape[0] >= _DENSE_FROM[variant][x.dtype]
    if not rounded or (variant, x.dtype) in _ROUNDS_ITSELF:
        return product.linear(x, size, codes, scale, zero, table, bias, rounded)
    y = x.new_empty(x.shape[0], shape[0])
    blocks = list(row_blocks(shape[0], shape[1], x.device))
    room = x.new_empty(shape[1] * max(stop - start for start, stop in blocks))
    for start, stop in blocks:
        weight = room[: shape[1] * (stop - start)].view(shape[1], -1)
        product.dequantize(size, codes, scale, zero, table, (start, stop), weight)
        y[:, start:stop] = linear(x, weight.t(), None if bias is None else bias[start:stop])
    return y


def _dequantize_packed(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    table: torch.Tensor | None,
    shape: Sequence[int],
    bits: int,
    variant: str,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty(shape[1], stop - start, dtype=dtype)
    library(variant, bits).dequantize(tuple(shape), codes, scale, zero, table, (start, stop), out)
    return out


def _gather_packed(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    table: torch.Tensor | None,
    shape: Sequence[int],
    bits: int,
    variant: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return library(variant, bits).gather(rows, tuple(shape), codes, scale, zero, table, dtype)


torch.library.define("trifold::packed_linear", f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
torch.library.define(
    "trifold::dequantize_packed", f"({_WEIGHT}, SymInt start, SymInt stop, ScalarType dtype) -> Tensor"
)
torch.library.define("trifold::gather_packed", f"(Tensor rows, {_WEIGHT}, ScalarType dtype) -> Tensor")
torch.library.impl("trifold::packed_linear", "cpu", _packed_linear)
torch.library.impl("trifold::dequantize_packed", "cpu", _dequantize_packed)
torch.library.impl("trifold::gather_packed", "cpu", _gather_packed)


@torch.library.register_fake("trifold::packed_linear")
def _(x, bias, codes, scale, zero, table, shape, bits, variant):
    return x.new_empty(x.shape[0], shape[0])


@torch.library.register_fake("trifold::dequantize_packed")
def _(codes, scale, zero, table, shape, bits, variant, start, stop, dtype):
    return codes.new_empty(shape[1], stop - start, dtype=dtype)


@torch.library.register_fake("trifold::gather_packed")
def _(rows, codes, scale, zero, table, shape, bits, variant, dtype):
    return codes.new_empty(rows.shape[0], shape[1], dtype=dtype)
