"""2:4 on sparse tensor cores, through torch's semi-structured operators (CUTLASS)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from trifold.formats.base import Spec
from trifold.formats.bitstream import pack_bits, unpack_bits
from trifold.formats.sparse24 import index_of, mask_of
from trifold.kernels.op import Op, Tensors

_FLOATS = ("float16", "bfloat16")
_TOKENS = 8  # the product takes multiples of it


class TorchSparse24(Op):
    """`sparse24` of 16-bit numbers, activations of the same dtype; rows of a multiple of 32, columns of 64.

    Compute capability 8.x. Not for 9.0, where torch has cuSPARSELt alone, whose layout cannot be turned back; nor for
    int4, for which torch has no product of sparse tensor cores.
    """

    name = "sparse.torch24"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        (rows, columns), name = spec["shape"], str(dtype).removeprefix("torch.")
        if "dtype" not in spec:
            return "torch has no 2:4 product with integer weights of 4 bits"
        if name not in _FLOATS or spec["dtype"] != name:
            return f"takes bfloat16 or float16 for activations and survivors alike, not {dtype} and {spec['dtype']}"
        if rows % 32 or columns % 64:
            return f"takes rows of a multiple of 32 and columns of 64, not {rows} x {columns}"
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        capability = torch.cuda.get_device_capability(device)
        return None if capability[0] == 8 else f"torch's 2:4 product takes compute capability 8.x, not {capability}"

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        """Survivors lie as torch wants them; their places go into the order of the tensor cores."""
        rows, columns = spec["shape"]
        mask = mask_of(unpack_bits(tensors["weight_index"], 4, columns // 4))
        weight = tensors["weight"].reshape(rows, columns // 2)
        _, meta = _conversions().sparse_semi_structured_from_dense_cutlass(mask.to(weight.dtype))
        return {"packed": weight, "meta": meta}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        ones = torch.ones_like(tensors["packed"])
        mask = _conversions().sparse_semi_structured_to_dense_cutlass(ones, tensors["meta"]) != 0
        return {"weight": tensors["packed"].reshape(-1), "weight_index": pack_bits(index_of(mask), 4)}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return super().rows(self.restore(tensors, spec), spec, start, stop, dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        """torch's operators themselves: the tensor subclass around them changes from release to release."""
        weight = tensors["packed"], tensors["meta"]
        right = pad(x, (0, 0, 0, -len(x) % _TOKENS)).t()
        if bias is None:
            y = torch._sparse_semi_structured_mm(*weight, right)
        else:
            y = torch._sparse_semi_structured_addmm(bias, *weight, right)
        return y.t()[: len(x)].contiguous()


def _conversions() -> Any:
    from torch.sparse import _semi_structured_conversions

    return _semi_structured_conversions
