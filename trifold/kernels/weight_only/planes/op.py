"""Weights in bit planes on NVIDIA GPUs, through Triton."""

from __future__ import annotations

from typing import Any

import torch

from trifold.core.canonical import Quantized
from trifold.core.scheme import Scheme
from trifold.formats.base import Spec
from trifold.formats.bitstream import pack_bits, unpack_bits
from trifold.formats.quantized import scheme_of
from trifold.kernels.gpu import no_gpu
from trifold.kernels.op import Tensors
from trifold.kernels.rows import dequantize, zero_points
from trifold.kernels.weight_only.blockwise import Blockwise
from trifold.kernels.weight_only.planes import ops
from trifold.kernels.weight_only.planes.configs import dense_from
from trifold.kernels.weight_only.planes.layout import SLOT, layout_of, pack_planes, unpack_planes


def arguments(tensors: Tensors, spec: Spec) -> dict[str, Any]:
    scheme = scheme_of(spec)
    return {
        "planes": [tensors[f"plane{i}"] for i in range(len(layout_of(scheme.bits).planes))],
        "scale": tensors["scale"],
        "zero": tensors.get("zero"),
        "bits": scheme.bits,
        "group": _group(scheme, spec["shape"][1]),
        "grid": scheme.grid,
        "midpoint": scheme.midpoint,
    }


def _group(scheme: Scheme, in_features: int) -> int:
    """Inputs that share a scale; if all do, as many as the kernel likes."""
    width = scheme.group_width(in_features)
    tile = layout_of(scheme.bits).tile
    return width if width < in_features else -(-in_features // tile) * tile


def _by_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().clone(memory_format=torch.contiguous_format)  # strides too, where a dimension is 1


class PlaneGemm(Blockwise):
    """Integers of 1 to 8 bits, FP8, tables of 4 bits; groups of whole 32s; float16 and bfloat16 activations.

    Compute capability 8.0 on. Few tokens: unpacked in registers in front of tensor cores, in fp16 with float32 sums.
    Many: dequantised tiles.
    """

    name = "weight_only.planes"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme, (out_features, in_features) = scheme_of(spec), spec["shape"]
        if dtype not in (torch.float16, torch.bfloat16):
            return f"takes torch.float16 or torch.bfloat16 activations, not {dtype}"
        if scheme.grid not in ops.COMPUTED and scheme.bits != 4:
            return f"grid={scheme.grid} is a table of {scheme.bits} bits, not of 4"
        width = scheme.group_width(in_features)
        if width < in_features and width % SLOT:
            return f"group_size={scheme.group_size} is not a multiple of {SLOT}"
        if out_features * max(layout_of(scheme.bits).tile, dense_from(scheme.bits)) >= 2**31:
            return f"out_features={out_features} overflows an int32 index"
        return no_gpu(device)

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        scheme, (out_features, in_features) = scheme_of(spec), spec["shape"]
        if spec["format"] == "fp8":
            codes = tensors["weight"].squeeze(-1).view(torch.uint8)
        else:
            codes = unpack_bits(tensors["weight"], scheme.bits, in_features)
        planes = {f"plane{i}": plane for i, plane in enumerate(pack_planes(codes, scheme.bits))}
        zero = zero_points(tensors, spec, slice(0, out_features))
        numbers = {"scale": tensors["weight_scale"]} | ({} if zero is None else {"zero": zero})
        return planes | {name: t.t().expand(-1, out_features).contiguous() for name, t in numbers.items()}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        scheme, (out_features, in_features) = scheme_of(spec), spec["shape"]
        rows = scheme.scale_shape(out_features, in_features)[0]
        scale, zero = _by_row(tensors["scale"][:, :rows]), tensors.get("zero")
        codes = self._codes(tensors, spec, 0, out_features)
        if spec["format"] == "fp8":
            assert scheme.table is not None and scheme.table.dtype is not None
            return {"weight": codes.view(scheme.table.dtype).unsqueeze(-1), "weight_scale": scale}
        portable = {"weight": pack_bits(codes, scheme.bits), "weight_scale": scale}
        if zero is not None and scheme.zero_point == "real":
            portable["weight_zero_point"] = _by_row(zero[:, :rows])
        elif zero is not None:
            portable["weight_zero_point"] = _by_row(pack_bits(zero[:, :rows], scheme.bits))
        return portable

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if tensors["scale"].is_cuda:
            return ops.plane_rows(
                **arguments(tensors, spec), in_features=spec["shape"][1], start=start, stop=stop, dtype=dtype
            )
        scheme, which = scheme_of(spec), slice(start, stop)
        if scheme.group_size == "tensor":
            which = slice(0, 1)
        scale, zero = tensors["scale"][:, which].t(), tensors.get("zero")
        codes = self._codes(tensors, spec, start, stop)
        return dequantize(Quantized(codes, scale, None if zero is None else zero[:, which].t(), scheme), dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] >= dense_from(spec["bits"]):
            return super().run(x, tensors, spec, bias)
        return ops.plane_linear(x, bias=bias, **arguments(tensors, spec))

    @staticmethod
    def _codes(tensors: Tensors, spec: Spec, start: int, stop: int) -> torch.Tensor:
        planes = arguments(tensors, spec)["planes"]
        return unpack_planes(planes, spec["bits"], spec["shape"][1], start, stop)
