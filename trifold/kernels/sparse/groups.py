"""Groups of integers, survivors alone, on CPUs: dropped groups cost nothing. See `kernels/native/group_sparse.c`."""

from __future__ import annotations

import torch

from trifold.core.errors import CheckpointError
from trifold.core.scheme import SCALE_DTYPES
from trifold.formats.base import Spec
from trifold.formats.bitstream import unpack_bits, words_for
from trifold.formats.group_sparse import groups_in_row
from trifold.formats.quantized import scheme_of
from trifold.formats.sparse import pack_stream
from trifold.kernels.op import Tensors
from trifold.kernels.sparse.cpu import TAIL, Compiled, check_starts, longer


class CompiledGroups(Compiled):
    """`group_sparse_int` of 1 to 8 bits, any group size; float32, bfloat16 and float16 activations."""

    source = "group_sparse.c"
    tensors = ("start", "number", "codes", "scale", "zero")

    def __init__(self, variant: str) -> None:
        super().__init__("groups", variant)

    def lacks(self, spec: Spec) -> str | None:
        return "takes scales of one level, not scale_bits=8" if spec.get("scale_bits") else None

    def width(self, spec: Spec) -> int:
        return int(spec["bits"])

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """Rows, columns, group, whether there are zero-points, scales are float32, group numbers have 16 bits."""
        rows, columns = spec["shape"]
        scheme, wide = scheme_of(spec), spec["scale_dtype"] != "bfloat16"
        return rows, columns, spec["group_size"], int(not scheme.symmetric), int(wide), int(groups_in_row(spec) > 256)

    def survivors(self, spec: Spec) -> int:
        return int(spec["groups"] * spec["group_size"])

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        group, groups, bits = spec["group_size"], spec["groups"], spec["bits"]
        unit = 16 if -(-group // 16) % 2 else 32
        number, scale = tensors["weight_column"], tensors["weight_scale"]
        check_starts(tensors["weight_row_start"], groups)
        if groups and not 0 <= int(number.min()) <= int(number.max()) < groups_in_row(spec):
            raise CheckpointError(
                f"weight_column has {int(number.min())}..{int(number.max())} in a row of {groups_in_row(spec)} groups; "
                "the file is damaged"
            )
        made = {
            "start": tensors["weight_row_start"],
            "number": longer(number),
            "codes": torch.zeros(groups * -(-group // unit) * unit * bits // 8 + TAIL, dtype=torch.uint8),
            "scale": longer(scale.to(torch.float32 if self.shape(spec)[4] else torch.bfloat16)),
        }
        if not spec["symmetric"]:
            made["zero"] = unpack_bits(tensors["weight_zero_point"][None], bits, groups)[0]
        self._library(spec).convert(self.shape(spec), self._stored(made), tensors["weight"].contiguous(), False)
        return made

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        group, groups, bits = spec["group_size"], spec["groups"], spec["bits"]
        words = torch.zeros(words_for(groups * group, bits), dtype=torch.int32)
        self._library(spec).convert(self.shape(spec), self._stored(tensors), words, True)
        portable = {
            "weight": words,
            "weight_row_start": tensors["start"],
            "weight_column": tensors["number"][:groups].clone(),
            "weight_scale": tensors["scale"][:groups].to(SCALE_DTYPES[spec["scale_dtype"]], copy=True),
        }
        if not spec["symmetric"]:
            portable["weight_zero_point"] = pack_stream(tensors["zero"], bits)
        return portable
