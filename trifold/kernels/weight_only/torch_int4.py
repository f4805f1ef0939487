"""torch's int4 product for bfloat16 activations on CPUs: `aten::_weight_int4pack_mm_for_cpu`.

It computes x Wᵀ with W = (code - 8) * scale + zero in float32, scale and zero being bfloat16. Our
(code - zero_point) * scale becomes that by a shift of the codes that puts the midpoint at 8, so that a
symmetric weight has zero = 0; a zero that bfloat16 rounds is off by at most |8 - zero_point| * scale / 512.
"""

from __future__ import annotations

import torch

from trifold.core.scheme import Scheme
from trifold.formats.base import Spec
from trifold.formats.bitstream import pack_bits, unpack_bits
from trifold.formats.quantized import scheme_of
from trifold.kernels.op import Tensors
from trifold.kernels.rows import dequantize, with_codes, zero_points
from trifold.kernels.weight_only.blockwise import Blockwise
from trifold.kernels.weight_only.int4_layout import CHUNK, pack, packs_by_chunks, unpack

GROUPS = (256, 128, 64, 32)  # what the product takes
DENSE_FROM = 96
"""Number of tokens from which dequantised tiles are faster: measured on a core with AVX-512 and AMX."""


def _group(scheme: Scheme, in_features: int) -> int | None:
    """The largest group the product takes that never straddles two of ours."""
    width = scheme.group_width(in_features)
    return next((g for g in GROUPS if width % g == 0 and in_features % g == 0), None)


def _shift(scheme: Scheme) -> int:
    return 8 - int(scheme.midpoint)


class TorchInt4(Blockwise):
    """Integers of 2 to 4 bits, bfloat16 activations, CPUs with AVX2 or AVX-512; the codes take 4 bits each."""

    name = "weight_only.torch_int4"
    replaces = True

    def supports(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
        scheme = scheme_of(spec)
        out_features, in_features = spec["shape"]
        if scheme.scale_dtype != "bfloat16":
            return f"scale_dtype={scheme.scale_dtype} would be rounded to bfloat16"
        if not 2 <= scheme.bits <= 4:
            return f"bits={scheme.bits} is outside 2..4"
        if out_features % 16:
            return f"out_features={out_features} is not a multiple of 16"
        if _group(scheme, in_features) is None:
            return f"group_size={scheme.group_size} with in_features={in_features} is not made of whole 32s"
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX"):
            return f"the processor ({capability}) has no fast path for it"
        if not packs_by_chunks():
            return "this build of torch packs int4 weights in an unknown way"
        return None

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        scheme = scheme_of(spec)
        out_features, in_features = spec["shape"]
        codes = unpack_bits(tensors["weight"], scheme.bits, in_features) + _shift(scheme)
        scale, zero = tensors["weight_scale"].float(), zero_points(tensors, spec, slice(0, out_features))
        offset = torch.zeros_like(scale) if zero is None else 8 - _shift(scheme) - zero.float()
        pairs = torch.stack([scale.bfloat16(), (offset * scale.bfloat16().float()).bfloat16()], dim=-1)
        step = _group(scheme, in_features)
        assert step is not None
        group = torch.arange(0, in_features, step, device=scale.device) // scheme.group_width(in_features)
        pairs = pairs.expand(out_features, -1, 2)[:, group].transpose(0, 1).contiguous()
        kept = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        return {"codes": pack(codes), "scale_and_zero": pairs, **kept}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        scheme = scheme_of(spec)
        kept = {name: t for name, t in tensors.items() if name not in ("codes", "scale_and_zero")}
        return {"weight": pack_bits(unpack(tensors["codes"]) - _shift(scheme), scheme.bits), **kept}

    def rows(self, tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        first = start - start % CHUNK
        last = min(-(-stop // CHUNK) * CHUNK, spec["shape"][0])
        codes = unpack(tensors["codes"][first:last])[start - first : stop - first] - _shift(scheme_of(spec))
        return dequantize(with_codes(codes, tensors, spec, slice(start, stop)), dtype)

    def run(self, x: torch.Tensor, tensors: Tensors, spec: Spec, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] >= DENSE_FROM:
            return super().run(x, tensors, spec, bias)
        pairs = tensors["scale_and_zero"]
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), tensors["codes"], spec["shape"][1] // pairs.shape[0], pairs
        )
        return y if bias is None else y.add_(bias)
