"""Bitmaps and survivors on CPUs: loaded sparse, multiplied dense. See `kernels/native/bitmask.c`.

`sparse24` runs on the same code: two of four are a bitmap too, of as many bits as its own codes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from trifold.core.errors import CheckpointError
from trifold.core.scheme import SCALE_DTYPES
from trifold.formats.base import Spec
from trifold.formats.bitmask import starts_of
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import pack_stream
from trifold.kernels.op import Tensors
from trifold.kernels.sparse.cpu import TAIL, Compiled, longer

_SPAN = 64


class CompiledBitmap(Compiled):
    """`bitmask` and `sparse24` of bfloat16 or int4; float32, bfloat16 and float16 activations."""

    source = "bitmask.c"
    tensors = ("start", "mask", "values", "scale", "zero")

    def __init__(self, variant: str) -> None:
        super().__init__("bitmap", variant)

    def lacks(self, spec: Spec) -> str | None:
        return no_survivors(spec)

    def width(self, spec: Spec) -> int:
        return 16 if "dtype" in spec else 4

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """Rows, columns; of integers group, whether there are zero-points, scales are float32, rows share them."""
        rows, columns = spec["shape"]
        if "dtype" in spec:
            return rows, columns
        scheme, wide = scheme_of(spec), spec["scale_dtype"] != "bfloat16"
        shared = scheme.group_size == "tensor"
        return rows, columns, scheme.group_width(columns), int(not scheme.symmetric), int(wide), int(shared)

    def survivors(self, spec: Spec) -> int:
        return survivors_of(spec)

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        words = mask_words(tensors, spec)
        if "dtype" in spec:
            return {"start": starts_of(counts(words).sum(1)), "mask": words, "values": longer(tensors["weight"])}
        (rows, columns), scheme = spec["shape"], scheme_of(spec)
        spans = _spans(words, columns, scheme.group_width(columns))
        start = pad(((counts(spans) + 1) // 2).sum(1).cumsum(0), (1, 0))
        wide = torch.float32 if self.shape(spec)[4] else torch.bfloat16
        made = {
            "start": start,
            "mask": spans,
            "values": torch.zeros(int(start[-1]) + TAIL, dtype=torch.uint8),
            "scale": tensors["weight_scale"].to(wide),
        }
        if not scheme.symmetric:
            shape = scheme.scale_shape(rows, columns)
            zero = unpack_bits(tensors["weight_zero_point"][None], scheme.bits, shape[0] * shape[1])
            made["zero"] = zero.reshape(shape)
        self._library(spec).convert(self.shape(spec), self._stored(made), tensors["weight"].contiguous(), False)
        return made

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        count, columns = survivors_of(spec), spec["shape"][1]
        if "dtype" in spec:
            return {"weight": tensors["values"][:count].clone(), **mask_tensors(tensors["mask"], spec)}
        scheme = scheme_of(spec)
        words = torch.zeros(words_for(count, scheme.bits), dtype=torch.int32)
        self._library(spec).convert(self.shape(spec), self._stored(tensors), words, True)
        portable = {
            "weight": words,
            "weight_scale": tensors["scale"].to(SCALE_DTYPES[spec["scale_dtype"]], copy=True),
            **mask_tensors(_words(tensors["mask"], columns, scheme.group_width(columns)), spec),
        }
        if not scheme.symmetric:
            portable["weight_zero_point"] = pack_stream(tensors["zero"], scheme.bits)
        return portable


def _aligned(columns: int, width: int) -> bool:
    return width % _SPAN == 0 and columns % width == 0


def _spans(words: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    """int32 (rows, words) -> int64 (rows, spans): groups of `width` columns filled up to whole spans."""
    if _aligned(columns, width):
        return words.view(torch.int64)
    mask = unpack_bits(words, 1, columns)
    by_group = pad(mask, (0, -columns % width)).unflatten(1, (-1, width))
    return pack_bits(pad(by_group, (0, -width % _SPAN)).flatten(1), 1).view(torch.int64)


def _words(spans: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    """The inverse."""
    if _aligned(columns, width):
        return spans.view(torch.int32)
    mask = unpack_bits(spans.view(torch.int32), 1, spans.shape[1] * _SPAN)
    by_group = mask.unflatten(1, (-(-columns // width), -1))[..., :width]
    return pack_bits(by_group.flatten(1)[:, :columns], 1)


def no_survivors(spec: Spec) -> str | None:
    """Why compiled code does not read the survivors of a bitmap, or None."""
    if "dtype" in spec:
        return None if spec["dtype"] == "bfloat16" else f"takes bfloat16 survivors, not {spec['dtype']}"
    if spec.get("grid", "int") != "int":
        return f"takes integers, not grid={spec['grid']}"
    if spec.get("zero_point", "integer") != "integer":
        return "takes integer zero-points, not real ones"
    return None if spec["bits"] == 4 else f"bits={spec['bits']} is not 4"


def survivors_of(spec: Spec) -> int:
    rows, columns = spec["shape"]
    return int(spec["survivors"] if spec["format"] == "bitmask" else rows * columns // 2)


def counts(words: torch.Tensor) -> torch.Tensor:
    """How many bits of each number of a row are set: int64, the same shape."""
    octets = words.contiguous().view(torch.uint8).unflatten(1, (words.shape[1], -1))
    return _through(octets, _set_bits()).sum(2)


def mask_words(tensors: Tensors, spec: Spec) -> torch.Tensor:
    """The bitmap of a `bitmask` or `sparse24`, int32 (rows, words). Raises CheckpointError if it cannot be one."""
    if spec["format"] == "sparse24":
        octets = tensors["weight_index"].contiguous().view(torch.uint8)
        words = _through(octets, _octets()).view(torch.int32)
        if int(counts(words).sum()) != survivors_of(spec):
            raise CheckpointError("weight_index has a code that names no two places; the file is damaged")
        return words
    words = tensors["weight_mask"]
    starts = starts_of(counts(words).sum(1))
    if not torch.equal(starts, tensors["weight_row_start"]) or int(starts[-1]) != spec["survivors"]:
        raise CheckpointError("weight_mask and weight_row_start do not count the same survivors; the file is damaged")
    return words


def mask_tensors(words: torch.Tensor, spec: Spec) -> Tensors:
    """The inverse."""
    if spec["format"] == "sparse24":
        code, bits = torch.arange(16, dtype=torch.uint8), _quads()
        back = torch.zeros(16, dtype=torch.uint8)
        back[bits[bits > 0].long()] = code[bits > 0]
        both = (back[None, :] | back[:, None] << 4).flatten()
        return {"weight_index": _through(words.contiguous().view(torch.uint8), both).view(torch.int32)}
    return {"weight_mask": words, "weight_row_start": starts_of(counts(words).sum(1))}


def _through(octets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table.to(octets.device)[octets.int()]


def _set_bits() -> torch.Tensor:
    return unpack_bits(torch.arange(256, dtype=torch.int32)[:, None], 1, 8).sum(1)


def _quads() -> torch.Tensor:
    """A code of `sparse24` -> the four bits of a bitmap that it stands for; no bits for what is no code."""
    code = torch.arange(16, dtype=torch.int32)
    first, second = code & 3, code >> 2
    return torch.where(first < second, (1 << first) | (1 << second), 0).to(torch.uint8)


def _octets() -> torch.Tensor:
    """The same for two codes in a byte."""
    return (_quads()[None, :] | _quads()[:, None] << 4).flatten()
