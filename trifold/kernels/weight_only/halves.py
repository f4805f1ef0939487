"""bfloat16 numbers beside compressed parts, such as the factors of low rank, in C.

torch's `linear` lets oneDNN reorder bfloat16 weights in every call; thin factors, of which a layer has two, are then
far from the speed of memory. Here they lie as the instructions take them, and both products are one call
(`kernels/native/stages.c`). Activations keep their precision; what is between two factors is rounded as two products
would, once.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from trifold.formats.base import Spec
from trifold.kernels.native.stages import Layer, Part, bind, lacking, pack_halves, unpack_halves
from trifold.kernels.op import Call, Op, Tensors
from trifold.kernels.rows import row_blocks

_DENSE_FROM = {
    "amx": {torch.float32: 128},
    "avx512_bf16": {torch.float32: 128},
    "avx512": {torch.bfloat16: 64, torch.float32: 128},
    "avx2": {torch.bfloat16: 32, torch.float32: 32},
    "portable": {torch.bfloat16: 16, torch.float32: 16},
}
"""Number of tokens from which the platform's product is faster; never, where there is no number."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Halves(Op):
    """`dense` and `low_rank` in bfloat16; float32, bfloat16 and float16 activations."""

    replaces = True

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.name = f"weight_only.halves_{variant}"  # type: ignore[misc]

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if spec["dtype"] != "bfloat16":
            return f"takes bfloat16 weights, not {spec['dtype']}"
        if dtype not in _FLOATS:
            return f"takes float32, bfloat16 and float16 activations, not {dtype}"
        if 0 in spec["shape"] or spec.get("rank") == 0:
            return "the weight is empty"
        return lacking(self.variant)

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        return {name: pack_halves(self.variant, tensors[name].reshape(size)) for name, size in _shapes(spec).items()}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        return {name: self._rows(tensors, name, size, 0, size[0]).reshape(-1) for name, size in _shapes(spec).items()}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        first, sizes = start - start % 16, _shapes(spec)
        found = self._rows(tensors, "weight", sizes["weight"], first, stop)[start - first :]
        if "rank" not in spec:
            return found.to(dtype)
        right = self._rows(tensors, "weight_right", sizes["weight_right"], 0, spec["rank"])
        return (found.float() @ right.float()).to(dtype)

    def _rows(self, tensors: Tensors, name: str, size: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        return unpack_halves(self.variant, tensors[name], size, start, stop)

    def most_tokens(self, dtype: torch.dtype) -> int:
        """Of `dtype`, up to which this kernel runs."""
        return _DENSE_FROM[self.variant].get(dtype, 2**62) - 1

    def bind(self, tensors: Tensors, spec: Spec) -> Call:
        product = bind([_layer(tensors, spec)], self.variant)
        few = {dtype: self.most_tokens(dtype) for dtype in (torch.float32, torch.bfloat16)}

        def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if len(x) <= few.get(x.dtype, 0):
                return product(x.contiguous(), [None if bias is None else bias.contiguous()])[0]
            return self.run(x, tensors, spec, bias)

        return call

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dtype == torch.float16:
            return self.run(x.float(), tensors, spec, None if bias is None else bias.float()).half()
        if len(x) > self.most_tokens(x.dtype):
            if "rank" in spec:
                x = self._dense(x, tensors, "weight_right", spec, None)
            return self._dense(x, tensors, "weight", spec, bias)
        layer = _layer(tensors, spec)
        y: torch.Tensor = torch.ops.trifold.staged_linear(x, bias, layer.tensors, layer.layout, self.variant)
        return y

    def _dense(
        self, x: torch.Tensor, tensors: Tensors, name: str, spec: Spec, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The platform's product, with blocks of rows in their own order."""
        size = _shapes(spec)[name]
        y = x.new_empty(x.shape[0], size[0])
        for start, stop in row_blocks(*size, x.device):
            weight = self._rows(tensors, name, size, start, stop).to(x.dtype)
            y[:, start:stop] = linear(x, weight, None if bias is None else bias[start:stop])
        return y


def parts(tensors: Tensors, spec: Spec) -> dict[str, Part]:
    """What `stages` takes of the matrices, by name."""
    return {name: Part(16, (*size, size[1], 0, 0), tensors[name]) for name, size in _shapes(spec).items()}


def _layer(tensors: Tensors, spec: Spec) -> Layer:
    found = parts(tensors, spec)
    if "rank" in spec:
        return Layer.of(right=found["weight_right"], left=found["weight"])
    return Layer.of(base=found["weight"])


def _shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """Of the matrices by name."""
    rows, columns = spec["shape"]
    if "rank" not in spec:
        return {"weight": (rows, columns)}
    return {"weight": (rows, spec["rank"]), "weight_right": (spec["rank"], columns)}
