"""What compiled products with sparse weights share: the operators of torch, and dense tiles for many tokens.

Activations keep their precision: bfloat16 ones are multiplied as such (AVX512-BF16) or exactly widened, float16 ones
are widened, sums are float32. Integers are exact until they are scaled. A row is summed by one thread in one order, so
results do not depend on the number of threads, who get rows of about as many survivors each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import linear, pad

from trifold.core.errors import CheckpointError
from trifold.formats.base import Spec
from trifold.kernels import native
from trifold.kernels.op import Op, Tensors
from trifold.kernels.rows import row_blocks
from trifold.kernels.sparse.library import Library, Stored, load

TAIL = 64
"""Numbers that vectors may read after the last."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DENSE_FROM = {
    "avx512_bf16": {torch.bfloat16: 32, torch.float32: 32},
    "avx512": {torch.bfloat16: 32, torch.float32: 32},
    "avx2": {torch.bfloat16: 32, torch.float32: 32},
    "portable": {torch.bfloat16: 32, torch.float32: 32},
}
"""Number of tokens from which dense tiles and the platform's product are faster."""


class Compiled(Op):
    """source: in `kernels/native`. tensors: names of the runtime layout, in the order in which the source takes them.

    width: BITS of the source. shape: what the source takes as such. survivors: that a call multiplies by.
    """

    replaces = True
    gathers = True
    source: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]

    def __init__(self, kind: str, variant: str) -> None:
        self.variant = variant
        self.name = f"sparse.{kind}_{variant}"  # type: ignore[misc]

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if dtype not in _FLOATS:
            return f"takes float32, bfloat16 and float16 activations, not {dtype}"
        reason = self.lacks(spec)
        if reason is None:
            loaded = load(self.source, self.variant, self.width(spec))
            reason = loaded if isinstance(loaded, str) else None
        return reason

    def lacks(self, spec: Spec) -> str | None:
        """Why such a weight is not for this source, or None."""
        return None

    @abstractmethod
    def width(self, spec: Spec) -> int: ...

    @abstractmethod
    def shape(self, spec: Spec) -> tuple[int, ...]: ...

    @abstractmethod
    def survivors(self, spec: Spec) -> int: ...

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self._decode(tensors, spec, None, start, stop, dtype)

    def gather(self, tensors: Tensors, spec: Spec, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if int(rows.min()) < 0 or int(rows.max()) >= spec["shape"][0]:
            raise IndexError(f"row {int(rows.min())}..{int(rows.max())} of a table with {spec['shape'][0]}")
        return self._decode(tensors, spec, rows.contiguous(), 0, 0, dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dtype == torch.float16:
            return self.run(x.float(), tensors, spec, None if bias is None else bias.float()).half()
        arguments = (x, bias, *self._arguments(tensors, spec), self.survivors(spec))
        if type(x) is torch.Tensor and not torch.compiler.is_compiling():  # the dispatcher takes as long as the call
            return _sparse_linear(*arguments)
        y: torch.Tensor = torch.ops.trifold.sparse_linear(*arguments)
        return y

    def _decode(
        self, tensors: Tensors, spec: Spec, wanted: torch.Tensor | None, start: int, stop: int, dtype: torch.dtype
    ) -> torch.Tensor:
        made = dtype if dtype in native.DTYPES else torch.float32
        arguments = self._arguments(tensors, spec)
        found: torch.Tensor = torch.ops.trifold.sparse_rows(*arguments, wanted, start, stop, made)
        return found.to(dtype)

    def _stored(self, tensors: Tensors) -> list[torch.Tensor | None]:
        return [tensors.get(name) for name in self.tensors]

    def _arguments(self, tensors: Tensors, spec: Spec) -> tuple[Any, ...]:
        """What both operators take of a weight."""
        return self._stored(tensors), self.shape(spec), self.source, self.variant, self.width(spec)

    def _library(self, spec: Spec) -> Library:
        return library(self.source, self.variant, self.width(spec))


def library(source: str, variant: str, bits: int) -> Library:
    loaded = load(source, variant, bits)
    assert isinstance(loaded, Library), loaded
    return loaded


def longer(tensor: torch.Tensor) -> torch.Tensor:
    """With a tail that vectors may read."""
    return (
        pad(tensor, (0, TAIL))
        if tensor.dtype != torch.bfloat16
        else pad(tensor.view(torch.int16), (0, TAIL)).view(torch.bfloat16)
    )


def check_starts(starts: torch.Tensor, total: int) -> None:
    """Raises CheckpointError unless rows follow each other from 0 to `total`: compiled code trusts them."""
    if int(starts[0]) != 0 or int(starts[-1]) != total or bool((starts[1:] < starts[:-1]).any()):
        raise CheckpointError(
            f"weight_row_start does not ascend from 0 to the {total} survivors that the spec says; the file is damaged"
        )


_WEIGHT = "Tensor?[] stored, int[] shape, str source, str variant, int bits"


def _sparse_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    stored: Stored,
    shape: Sequence[int],
    source: str,
    variant: str,
    bits: int,
    survivors: int,
) -> torch.Tensor:
    """x (M, in), float32 or bfloat16 -> (M, out)."""
    made, size = library(source, variant, bits), tuple(shape)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    if x.shape[0] < _DENSE_FROM[variant][x.dtype]:
        return made.linear(x, size, stored, bias, survivors)
    y = x.new_empty(x.shape[0], size[0])
    blocks = list(row_blocks(size[0], size[1], x.device))
    room = x.new_empty(max(stop - start for start, stop in blocks), size[1])
    for start, stop in blocks:
        tile = room[: stop - start]
        made.decode(size, stored, None, start, tile)
        y[:, start:stop] = linear(x, tile, None if bias is None else bias[start:stop])
    return y


def _sparse_rows(
    stored: Stored,
    shape: Sequence[int],
    source: str,
    variant: str,
    bits: int,
    wanted: torch.Tensor | None,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = torch.empty(stop - start if wanted is None else len(wanted), shape[1], dtype=dtype)
    library(source, variant, bits).decode(tuple(shape), stored, wanted, start, out)
    return out


torch.library.define("trifold::sparse_linear", f"(Tensor x, Tensor? bias, {_WEIGHT}, int survivors) -> Tensor")
torch.library.define(
    "trifold::sparse_rows", f"({_WEIGHT}, Tensor? wanted, SymInt start, SymInt stop, ScalarType dtype) -> Tensor"
)
torch.library.impl("trifold::sparse_linear", "cpu", _sparse_linear)
torch.library.impl("trifold::sparse_rows", "cpu", _sparse_rows)


@torch.library.register_fake("trifold::sparse_linear")
def _(x, bias, stored, shape, source, variant, bits, survivors):
    return x.new_empty(x.shape[0], shape[0])


@torch.library.register_fake("trifold::sparse_rows")
def _(stored, shape, source, variant, bits, wanted, start, stop, dtype):
    first = next(tensor for tensor in stored if tensor is not None)
    return first.new_empty(stop - start if wanted is None else wanted.shape[0], shape[1], dtype=dtype)
