"""Products with packed weights in C, once for each instruction set, chosen at run time.

`linear.c` is compiled for a variant and a width of codes when a weight first needs it (a second or two), or ahead of
time by `trifold build-kernels`; see `trifold.core.native` for the cache. Threads are OpenMP's: the library asks for
libgomp by the name under which torch has loaded its own, so the two share one pool. Each output is summed by one
thread in one order, so results do not depend on their number.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from trifold.core.native import NotCompiledError, compiled

SOURCE = Path(__file__).parent / "linear.c"
WIDTHS = range(1, 9)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "bmi2", "f16c", "fma")
_BFLOAT16 = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
_Tensor = torch.Tensor | None


@dataclass(frozen=True)
class Variant:
    """An instruction set. flags: of the compiler; needs: what /proc/cpuinfo calls its parts."""

    flags: tuple[str, ...]
    needs: tuple[str, ...]


VARIANTS = {
    "amx": Variant(
        (*_BFLOAT16, "-mamx-tile", "-mamx-bf16"), (*_AVX512, "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
    ),
    "avx512_bf16": Variant(_BFLOAT16, (*_AVX512, "avx512_bf16", "avx512_vnni")),
    "avx512": Variant(("-march=x86-64-v4",), _AVX512),
    "avx2": Variant(("-march=x86-64-v3",), ("avx2", "bmi2", "f16c", "fma")),
    "portable": Variant((), ()),
}
"""From the fastest to the one that every processor runs."""


@cache
def lacking(variant: str) -> str | None:
    """None if the processor has the instructions of a variant, else those that it lacks."""
    missing = [name for name in VARIANTS[variant].needs if name not in _features()]
    return f"the processor has no {' '.join(missing)}" if missing else None


@cache
def _features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return frozenset(words) if platform.machine() in ("x86_64", "AMD64") else frozenset()


class Library:
    """The functions of `linear.c` for one variant and width. Shapes are (rows, columns, group, kind, wide)."""

    def __init__(self, variant: str, bits: int) -> None:
        flags = (f"-DBITS={bits}", *VARIANTS[variant].flags)
        try:
            native = compiled(SOURCE, (*flags, "-fopenmp"))
        except NotCompiledError:  # some compilers come without OpenMP
            native = compiled(SOURCE, flags)
        if not native.ready():
            raise NotCompiledError("the system does not allow its registers")
        self._linear, self._dequantize = native.linear, native.dequantize
        self.runner = ctypes.cast(native.run_tiles, ctypes.c_void_p).value or 0  # what `stages.c` calls
        self._pack, self._restore, self._gather = native.pack, native.restore, native.gather
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._linear.argtypes = [pointer] * 8 + [count] * 4
        self._dequantize.argtypes = [pointer] * 5 + [count] * 2 + [pointer] + [count] * 2
        self._gather.argtypes = [pointer] * 6 + [count, pointer, count, count]
        self._rounded = native.rounded_linear
        self._rounded.argtypes = [pointer] * 8 + [count] * 4
        self._pack.argtypes = self._restore.argtypes = [pointer, pointer, count, pointer, count]
        self._dequantize.restype = self._pack.restype = self._restore.restype = None

    def linear(
        self,
        x: torch.Tensor,
        shape: tuple[int, ...],
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: _Tensor,
        table: _Tensor,
        bias: _Tensor,
        rounded: bool = False,
    ) -> torch.Tensor:
        """x (M, columns), float32 or bfloat16 -> (M, rows). bias: (rows,) of x's dtype. All contiguous.

        rounded: weights may be rounded to bfloat16 as x is, where the variant is faster then.
        """
        return self.bind(shape, codes, scale, zero, table)(x, bias, rounded)

    def bind(
        self, shape: tuple[int, ...], codes: torch.Tensor, scale: torch.Tensor, zero: _Tensor, table: _Tensor
    ) -> Callable[..., torch.Tensor]:
        """`linear` of one weight, as a function of x, bias and rounded."""
        rows, product = shape[0], self._linear
        size, most = _array(shape), _worth(shape)
        weight = (
            size,
            codes.data_ptr(),
            scale.data_ptr(),
            *(None if t is None else t.data_ptr() for t in (zero, table)),
        )
        kept = (codes, scale, zero, table)

        def call(x: torch.Tensor, bias: _Tensor, rounded: bool = False) -> torch.Tensor:
            tokens = x.shape[0]
            y = x.new_empty(tokens, rows)
            given = None if bias is None else bias.data_ptr()
            threads = min(most, torch.get_num_threads())
            if product(*weight, x.data_ptr(), given, y.data_ptr(), tokens, DTYPES[x.dtype], rounded, threads):
                raise MemoryError(f"no memory for {tuple(x.shape)} activations by {tuple(kept[0].shape)} codes")
            return y

        return call

    def rounded_linear(
        self,
        x: torch.Tensor,
        shape: tuple[int, ...],
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: _Tensor,
        given: _Tensor,
        largest: int,
        bias: _Tensor,
    ) -> torch.Tensor:
        """`linear` with x rounded to codes up to `largest`, by `given` (1,) float32 or a scale for each token."""
        y = x.new_empty(x.shape[0], shape[0])
        failed = self._rounded(
            _array(shape),
            codes.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            x.data_ptr(),
            None if given is None else given.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            largest,
            x.shape[0],
            DTYPES[x.dtype],
            _threads(shape),
        )
        if failed:
            raise MemoryError(f"no memory for {tuple(x.shape)} activations")
        return y

    def dequantize(
        self,
        shape: tuple[int, ...],
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: _Tensor,
        table: _Tensor,
        rows: tuple[int, int],
        out: torch.Tensor,
    ) -> None:
        """Fill `out`, (columns, stop - start) float32 or bfloat16, with rows start..stop-1, start a multiple of 16."""
        start, stop = rows
        self._dequantize(
            _array(shape),
            codes.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            None if table is None else table.data_ptr(),
            start,
            stop,
            out.data_ptr(),
            DTYPES[out.dtype],
            _threads(shape),
        )

    def gather(
        self,
        rows: torch.Tensor,
        shape: tuple[int, ...],
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: _Tensor,
        table: _Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """rows (n,) int64, contiguous, each below shape[0] -> (n, columns) of `dtype`."""
        out = torch.empty(len(rows), shape[1], dtype=dtype)
        failed = self._gather(
            _array(shape),
            codes.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            None if table is None else table.data_ptr(),
            rows.data_ptr(),
            len(rows),
            out.data_ptr(),
            DTYPES[dtype],
            min(_threads(shape), len(rows)),
        )
        if failed:
            raise MemoryError(f"no memory to look up {len(rows)} rows")
        return out

    def pack(self, shape: tuple[int, ...], words: torch.Tensor, codes: torch.Tensor) -> None:
        """Fill `codes`, uint8, from a format's words, int32 (rows, words of a row), both contiguous."""
        self._pack(_array(shape), words.data_ptr(), words.shape[1], codes.data_ptr(), _threads(shape))

    def restore(self, shape: tuple[int, ...], words: torch.Tensor, codes: torch.Tensor) -> None:
        """The inverse; `words` is zero at first."""
        self._restore(_array(shape), words.data_ptr(), words.shape[1], codes.data_ptr(), _threads(shape))


@lru_cache(maxsize=1024)
def _array(shape: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(shape))(*shape)


_WORTH = 2**16  # weights that are worth another thread


def _worth(shape: tuple[int, ...]) -> int:
    """How many threads a weight of this shape keeps busy."""
    return max(1, shape[0] * shape[1] // _WORTH)


def _threads(shape: tuple[int, ...]) -> int:
    return min(torch.get_num_threads(), _worth(shape))


@cache
def load(variant: str, bits: int) -> Library | str:
    """The library, or the reason why it cannot be had."""
    reason = lacking(variant)
    if reason is not None:
        return reason
    try:
        return Library(variant, bits)
    except NotCompiledError as error:
        return str(error)
