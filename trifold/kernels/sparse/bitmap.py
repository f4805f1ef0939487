"""Bitmaps and survivors on CPUs: loaded sparse, multiplied dense. See `kernels/native/bitmask.c`.

`sparse24` runs on the same code: two of four are a bitmap too, of as many bits as its own codes.
"""

from __future__ import annotations

import torch

from trifold.core.errors import CheckpointError
from trifold.core.scheme import SCALE_DTYPES
from trifold.formats.base import Spec
from trifold.formats.bitmask import starts_of
from trifold.formats.bitstream import pack_bits, unpack_bits, words_for
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import pack_stream
from trifold.formats.sparse24 import index_of, mask_of
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
        mask = mask_from(tensors, spec)
        if "dtype" in spec:
            words = tensors["weight_mask"] if spec["format"] == "bitmask" else pack_bits(mask, 1)
            return {"start": starts_of(mask.sum(1)), "mask": words, "values": longer(tensors["weight"])}
        (rows, columns), scheme = spec["shape"], scheme_of(spec)
        spans = self._by_span(mask, spec)
        octets = (spans.sum(2) + 1) // 2
        start = torch.nn.functional.pad(octets.sum(1).cumsum(0), (1, 0))
        wide = torch.float32 if self.shape(spec)[4] else torch.bfloat16
        made = {
            "start": start,
            "mask": pack_bits(spans.flatten(1), 1).view(torch.int64),
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
        rows, columns = spec["shape"]
        count = survivors_of(spec)
        if "dtype" in spec:
            mask = unpack_bits(tensors["mask"], 1, columns)
            return {"weight": tensors["values"][:count].clone(), **mask_tensors(mask, spec)}
        scheme = scheme_of(spec)
        words = torch.zeros(words_for(count, scheme.bits), dtype=torch.int32)
        self._library(spec).convert(self.shape(spec), self._stored(tensors), words, True)
        width = scheme.group_width(columns)
        spans = unpack_bits(tensors["mask"].view(torch.int32), 1, tensors["mask"].shape[1] * _SPAN)
        mask = spans.reshape(rows, -(-columns // width), -1)[..., :width].flatten(1)[:, :columns]
        portable = {
            "weight": words,
            "weight_scale": tensors["scale"].to(SCALE_DTYPES[spec["scale_dtype"]], copy=True),
            **mask_tensors(mask.contiguous(), spec),
        }
        if not scheme.symmetric:
            portable["weight_zero_point"] = pack_stream(tensors["zero"], scheme.bits)
        return portable

    @staticmethod
    def _by_span(mask: torch.Tensor, spec: Spec) -> torch.Tensor:
        """mask uint8 (rows, columns) -> (rows, spans, 64): groups filled up to whole spans."""
        width = scheme_of(spec).group_width(spec["shape"][1])
        groups = torch.nn.functional.pad(mask, (0, -mask.shape[1] % width)).unflatten(1, (-1, width))
        return torch.nn.functional.pad(groups, (0, -width % _SPAN)).reshape(len(mask), -1, _SPAN)


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


def mask_from(tensors: Tensors, spec: Spec) -> torch.Tensor:
    """The bitmap of a `bitmask` or `sparse24`, uint8 (rows, columns). Raises CheckpointError if it cannot be."""
    rows, columns = spec["shape"]
    if spec["format"] == "sparse24":
        mask = mask_of(unpack_bits(tensors["weight_index"], 4, columns // 4)).to(torch.uint8)
        if int(mask.sum()) != survivors_of(spec):
            raise CheckpointError("weight_index names one place twice; the file is damaged")
        return mask
    words = tensors["weight_mask"]
    mask = unpack_bits(words, 1, columns)
    starts = starts_of(mask.sum(1))
    if not torch.equal(starts, tensors["weight_row_start"]) or int(starts[-1]) != spec["survivors"]:
        raise CheckpointError("weight_mask and weight_row_start do not count the same survivors; the file is damaged")
    return mask


def mask_tensors(mask: torch.Tensor, spec: Spec) -> Tensors:
    """The inverse."""
    if spec["format"] == "sparse24":
        return {"weight_index": pack_bits(index_of(mask.bool()), 4)}
    return {"weight_mask": pack_bits(mask, 1), "weight_row_start": starts_of(mask.sum(1))}
