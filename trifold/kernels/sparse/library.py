"""The C sources of sparse products, once for each instruction set and width of the survivors.

All have the same functions; `kernels/native/sparse.h` and each source say what tensors and shape they take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch

from trifold.core.native import NotCompiledError, compiled
from trifold.kernels import native
from trifold.kernels.native import DTYPES, Variant

Stored = Sequence[torch.Tensor | None]

FOLDER = Path(native.__file__).parent
_EXPANDING = ("avx512_vbmi2",)  # Ice Lake and Zen 4 on
VARIANTS = {
    "avx512_bf16": Variant(
        (*native.VARIANTS["avx512_bf16"].flags, "-mavx512vbmi2"), native.VARIANTS["avx512_bf16"].needs + _EXPANDING
    ),
    **{name: native.VARIANTS[name] for name in ("avx512", "avx2", "portable")},
}
"""From the fastest to the one that every processor runs."""
_WORTH = 2**15  # survivors that are worth another thread


@cache
def lacking(variant: str) -> str | None:
    """None if the processor has the instructions of a variant, else those that it lacks."""
    missing = [name for name in VARIANTS[variant].needs if name not in native._features()]
    return f"the processor has no {' '.join(missing)}" if missing else None


class Library:
    """The functions of a source for one variant and width. stored, shape: as the source says."""

    def __init__(self, source: str, variant: str, bits: int) -> None:
        flags = (f"-DBITS={bits}", *VARIANTS[variant].flags)
        try:
            made = compiled(FOLDER / source, (*flags, "-fopenmp"))
        except NotCompiledError:  # some compilers come without OpenMP
            made = compiled(FOLDER / source, flags)
        self._linear, self._decode, self._convert = made.linear, made.decode, made.convert
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._linear.argtypes = [pointer] * 5 + [count] * 3
        self._decode.argtypes = [pointer] * 3 + [count] * 2 + [pointer] + [count] * 2
        self._convert.argtypes = [pointer] * 3 + [count] * 2
        self._decode.restype = self._convert.restype = None

    def linear(
        self, x: torch.Tensor, shape: tuple[int, ...], stored: Stored, bias: torch.Tensor | None, survivors: int
    ) -> torch.Tensor:
        """x (M, columns), float32 or bfloat16 -> (M, rows). bias: (rows,) of x's dtype. All contiguous."""
        y = x.new_empty(x.shape[0], shape[0])
        failed = self._linear(
            _array(shape),
            _pointers(stored),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.shape[0],
            DTYPES[x.dtype],
            _threads(survivors),
        )
        if failed:
            raise MemoryError(f"no memory for {tuple(x.shape)} activations")
        return y

    def decode(
        self, shape: tuple[int, ...], stored: Stored, wanted: torch.Tensor | None, start: int, out: torch.Tensor
    ) -> None:
        """Fill `out`, (n, columns) float32 or bfloat16, with the rows in `wanted`, int64 (n,), or n from start on."""
        threads = min(_threads(out.numel()), max(len(out), 1))
        rows = None if wanted is None else wanted.data_ptr()
        where, numbers = _pointers(stored), out.data_ptr()
        self._decode(_array(shape), where, rows, start, len(out), numbers, DTYPES[out.dtype], threads)

    def convert(self, shape: tuple[int, ...], stored: Stored, words: torch.Tensor, back: bool) -> None:
        """Codes from the stream of a format, int32 words, into `stored`, or back; what is written is zero at first."""
        threads = _threads(words.numel())
        self._convert(_array(shape), _pointers(stored), words.data_ptr(), int(back), threads)


@lru_cache(maxsize=1024)
def _array(shape: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(shape))(*shape)


def _pointers(stored: Stored) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(stored))(*(None if tensor is None else tensor.data_ptr() for tensor in stored))


def _threads(survivors: int) -> int:
    return max(1, min(torch.get_num_threads(), survivors // _WORTH))


@cache
def load(source: str, variant: str, bits: int) -> Library | str:
    """The library, or the reason why it cannot be had."""
    reason = lacking(variant)
    if reason is not None:
        return reason
    try:
        return Library(source, variant, bits)
    except NotCompiledError as error:
        return str(error)
