"""Products in two stages, of one layer or of several that share their input, in one call: see `stages.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from trifold.core.native import NotCompiledError, compiled
from trifold.kernels import native

BLOCK, ROWS = 16, 16
_SOURCE, _HALVES = (Path(__file__).parent / name for name in ("stages.c", "halves.c"))
_MOST_TOKENS = 64  # that go through both stages before the next do: what is between them stays in the cache
_WORTH = 2**16  # weights that are worth another thread
_Pair = tuple[int, Callable[..., None]]


class Part(NamedTuple):
    """One weight as `layout.h` has it (bits 1 to 8) or `halves.c` (16). shape: rows, columns, group, kind, wide."""

    bits: int
    shape: Sequence[int]
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None


class Layer(NamedTuple):
    """x Bᵀ, (x Rᵀ) Lᵀ or the sum of both. tensors, layout: what there is of B, R and L, and `pivots` and `places` as
    `stages.c` describes them; in the form that torch's operators take. shape: (out, in)."""

    tensors: tuple[torch.Tensor, ...]
    layout: tuple[int, ...]
    shape: tuple[int, int]

    @staticmethod
    def of(
        base: Part | None = None,
        right: Part | None = None,
        left: Part | None = None,
        pivots: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> Layer:
        """pivots: (rank,), places: (out - rank,) int64, ascending: which outputs are those of R, and of L."""
        first, last = right or base, base or left
        assert first is not None and last is not None
        rows = last.shape[0] + (0 if pivots is None else len(pivots))
        tensors: list[torch.Tensor | None] = []
        layout: list[int] = [rows, first.shape[1]]
        for part in (base, right, left):
            if part is None:
                layout += [0] * 7
                continue
            layout += [part.bits, *part.shape, int(part.zero is not None)]
            tensors += [part.codes, part.scale, part.zero]
        bits = None if pivots is None else _bits(pivots, rows)
        layout.append(int(bits is not None))
        tensors += [bits, places]
        return Layer(tuple(t for t in tensors if t is not None), tuple(layout), (rows, first.shape[1]))


def _bits(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """A bit for each of `count`, set for the given ones, and 4 bytes more; uint8."""
    every = torch.zeros(-(-count // 8) * 8 + 32, dtype=torch.uint8)
    every[numbers] = 1
    return (every.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


class _Part(ctypes.Structure):
    _fields_ = (
        ("run", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 5),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table")),
        ("tile_bytes", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Part) for name in ("base", "right", "left")),
        *((name, ctypes.c_void_p) for name in ("places", "pivots")),
        ("rows", ctypes.c_int64),
    )


def _part(variant: str, layout: Sequence[int], tensors: Iterator[torch.Tensor]) -> _Part:
    bits, *shape, zero = layout
    if not bits:
        return _Part()
    columns, group = shape[1:3]
    blocks = columns // group * -(-group // BLOCK) + -(-(columns % group) // BLOCK)
    return _Part(
        _runner(variant, bits),
        (ctypes.c_int64 * 5)(*shape),
        next(tensors).data_ptr(),
        None if bits == 16 else next(tensors).data_ptr(),
        next(tensors).data_ptr() if zero else None,
        None,
        blocks * bits * 32,
    )


def _layer(variant: str, layer: Layer) -> _Layer:
    tensors, layout = iter(layer.tensors), layer.layout
    parts = [_part(variant, layout[at : at + 7], tensors) for at in (2, 9, 16)]
    pivots, places = (next(tensors).data_ptr() if layout[23] else None for _ in range(2))
    return _Layer(*parts, places, pivots, layer.shape[0])


def bind(
    layers: Sequence[Layer], variant: str
) -> Callable[[torch.Tensor, Sequence[torch.Tensor | None]], list[torch.Tensor]]:
    """x (M, in), float32 or bfloat16, and for each layer a bias of that dtype or None -> for each layer (M, out). All
    contiguous. The tensors of the layers stay where they are while the result is in use.

    Raises MemoryError.
    """
    count, run = len(layers), _driver(variant)
    structs = (_Layer * count)(*(_layer(variant, layer) for layer in layers))
    rows, columns = [layer.shape[0] for layer in layers], layers[0].shape[1]
    worth = max(1, sum(layer.shape[0] * layer.shape[1] for layer in layers) // _WORTH)
    kept, pointers, narrow = tuple(layers), ctypes.c_void_p * count, variant in ("amx", "avx512_bf16")

    def call(x: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        tokens, half = x.shape[0], x.dtype == torch.bfloat16
        outputs = [x.new_empty(tokens, n) for n in rows]
        given = [None if bias is None else bias.data_ptr() for bias in biases]
        failed = run(
            structs,
            count,
            x.data_ptr(),
            columns,
            pointers(*given),
            pointers(*[y.data_ptr() for y in outputs]),
            tokens,
            int(half),
            int(not (half and narrow)),
            _MOST_TOKENS,
            min(worth, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError(f"no memory for {tuple(x.shape)} activations by {[layer.shape for layer in kept]}")
        return outputs

    return call


@cache
def _driver(variant: str) -> Callable[..., int]:
    function = _compiled(_SOURCE, native.VARIANTS[variant].flags).run_stages
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, count, pointer, count, pointer, pointer, *[count] * 5]
    return function


@cache
def _halves(variant: str) -> _Pair:
    """Address of the kernel for bfloat16 weights, and what converts them. Raises NotCompiledError."""
    library = _compiled(_HALVES, ("-DBITS=16", *native.VARIANTS[variant].flags))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.convert.argtypes = [count, count, pointer, pointer, *[count] * 4]
    library.convert.restype = None
    return _address(library), library.convert


def _compiled(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    try:
        return compiled(source, (*flags, "-fopenmp"))
    except NotCompiledError:  # some compilers come without OpenMP
        return compiled(source, flags)


def _address(library: ctypes.CDLL) -> int:
    address = ctypes.cast(library.run_tiles, ctypes.c_void_p).value
    assert address is not None
    return address


def _runner(variant: str, bits: int) -> int:
    if bits == 16:
        return _halves(variant)[0]
    library = native.load(variant, bits)
    assert isinstance(library, native.Library), library
    return library.runner


@cache
def lacking(variant: str) -> str | None:
    """None if bfloat16 weights can be multiplied in stages with a variant, else the reason why not."""
    reason = native.lacking(variant)
    if reason is not None:
        return reason
    try:
        _driver(variant), _halves(variant)
        loaded = native.load(variant, 4) if variant == "amx" else None  # asks for the registers
    except NotCompiledError as error:
        return str(error)
    return loaded if isinstance(loaded, str) else None


def pack_halves(variant: str, numbers: torch.Tensor) -> torch.Tensor:
    """numbers (rows, columns) bfloat16 -> in tiles, bfloat16, flat."""
    rows, columns = numbers.shape
    tiles, numbers = -(-rows // ROWS), numbers.contiguous()
    codes = numbers.new_empty(tiles * ROWS * -(-columns // BLOCK) * BLOCK)
    _halves(variant)[1](rows, columns, numbers.data_ptr(), codes.data_ptr(), 0, tiles, 0, torch.get_num_threads())
    return codes


def unpack_halves(variant: str, codes: torch.Tensor, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """Rows start .. stop - 1, start a multiple of 16, of what `pack_halves` has packed."""
    columns = shape[1]
    numbers = codes.new_empty(stop - start, columns)
    tiles = start // ROWS, -(-stop // ROWS)
    _halves(variant)[1](stop, columns, numbers.data_ptr(), codes.data_ptr(), *tiles, 1, torch.get_num_threads())
    return numbers


def _staged_linear(
    x: torch.Tensor, bias: torch.Tensor | None, tensors: Sequence[torch.Tensor], layout: Sequence[int], variant: str
) -> torch.Tensor:
    layer = Layer(tuple(tensors), tuple(layout), (layout[0], layout[1]))
    return bind([layer], variant)(x.contiguous(), [None if bias is None else bias.contiguous()])[0]


torch.library.define(
    "trifold::staged_linear", "(Tensor x, Tensor? bias, Tensor[] tensors, int[] layout, str variant) -> Tensor"
)
torch.library.impl("trifold::staged_linear", "cpu", _staged_linear)


@torch.library.register_fake("trifold::staged_linear")
def _(x, bias, tensors, layout, variant):
    return x.new_empty(x.shape[0], layout[0])
