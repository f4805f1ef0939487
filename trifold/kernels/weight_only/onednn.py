"""oneDNN's product with weights that it has put into its own order beforehand.

torch's `linear` lets oneDNN reorder bfloat16 weights in every call. Thin factors, of which a layer has two, are then
far from the speed of memory.
"""

from __future__ import annotations

from typing import Any

import torch

from trifold.formats.base import Spec
from trifold.kernels.op import Op, Tensors

_TOKENS = 64  # that the order of the weights is chosen for

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class OneDNN(Op):
    """bfloat16 numbers, as they are or as two factors, and bfloat16 activations on CPUs that have such products."""

    name = "weight_only.onednn"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        if spec["dtype"] != "bfloat16":
            return f"takes bfloat16 weights, not {spec['dtype']}"
        if 0 in spec["shape"] or spec.get("rank") == 0:
            return "the weight is empty"
        if not torch.backends.mkldnn.is_available() or _reorder is None or _linear is None:
            return "torch comes without oneDNN"
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "the processor has no bfloat16 products"
        return None

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        shapes = _shapes(spec)
        return {name: _reorder(tensors[name].reshape(shapes[name]).contiguous(), _TOKENS) for name in shapes}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        return {name: tensors[name].to_dense().reshape(-1) for name in _shapes(spec)}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return super().rows(self.restore(tensors, spec), spec, start, stop, dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if "rank" in spec:
            x = _linear(x, tensors["weight_right"], None, "none", [], "")
        y: torch.Tensor = _linear(x, tensors["weight"], bias, "none", [], "")
        return y


def _shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """Of the matrices by name."""
    rows, columns = spec["shape"]
    if "rank" not in spec:
        return {"weight": (rows, columns)}
    return {"weight": (rows, spec["rank"]), "weight_right": (spec["rank"], columns)}
