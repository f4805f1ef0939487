"""Packed layers with random codes, and what rounding allows."""

from __future__ import annotations

import pytest
import torch

from trifold.core.canonical import Quantized
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.formats import FORMATS, format_for
from trifold.kernels import PackedLinear
from trifold.kernels.rounded_input.torch_int8 import TorchInt8
from trifold.kernels.weight_only.torch_int4 import TorchInt4

WIDTHS = range(1, 9)
GROUPS = (16, 100, "channel", "tensor")


def quantized(
    out_features: int, in_features: int, bits: int, group, symmetric: bool, scale_dtype: str = "bfloat16"
) -> Quantized:
    """Random codes, zero-points and scales in 0.01..0.03."""
    scheme = Scheme(bits, group, symmetric, scale_dtype)  # type: ignore[arg-type]
    shape = scheme.scale_shape(out_features, in_features)
    generator = torch.Generator().manual_seed(hash((out_features, in_features, bits, symmetric)) % 2**31)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    scale = (0.01 + 0.02 * torch.rand(shape, generator=generator)).to(SCALE_DTYPES[scale_dtype])
    return Quantized(codes, scale, None if symmetric else zero, scheme)


OTHERS = [{"zero_point": "real"}, {"grid": "nf4"}, {"grid": "fp4_e2m1"}, {"grid": "fp8_e4m3", "bits": 8}]
"""Schemes whose grid is not one of integers with integer zero-points."""


def other(out_features: int, in_features: int, group, scale_dtype: str = "bfloat16", **scheme) -> Quantized:
    """One of OTHERS: random codes, each of them a number, scales in 0.01..0.03, zero-points in 0..15."""
    made = Scheme(group_size=group, scale_dtype=scale_dtype, **scheme)  # type: ignore[arg-type]
    shape = made.scale_shape(out_features, in_features)
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    codes = torch.randint(0, 2**made.bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    if made.grid == "fp8_e4m3":
        codes[codes & 127 == 127] = 0
    scale = (0.01 + 0.02 * torch.rand(shape, generator=generator)).to(SCALE_DTYPES[scale_dtype])
    zero = (15 * torch.rand(shape, generator=generator)).to(SCALE_DTYPES[scale_dtype])
    return Quantized(codes, scale, None if made.symmetric else zero, made)


def layer(weight: Quantized, bias: bool = False, input_bits: int | None = None) -> PackedLinear:
    """A PackedLinear that holds `weight`."""
    form = FORMATS.get(format_for(weight))
    spec = form.describe(weight) | ({"input": {"bits": input_bits}} if input_bits else {})
    module = PackedLinear(spec, bias, torch.float32)
    tensors = form.pack(weight)
    if bias:
        tensors["bias"] = torch.linspace(-1, 1, weight.shape[0])
    module.load_state_dict(tensors)
    return module


def _runs(op, bits: int) -> bool:
    spec = layer(quantized(16, 32, bits, "channel", True), input_bits=8).spec
    return op.supports(spec, torch.bfloat16, torch.device("cpu")) is None


def activations(tokens: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def excess(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, roundings: int = 1
) -> float:
    """Largest error of y against x Wᵀ + b in float64, over the error that arithmetic in y's dtype may make:
    the weights and `roundings` results in that dtype, sums in float32. At most 1 if all is well."""
    eps = torch.finfo(y.dtype).eps
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    inexact = 0.0 if y.dtype in (torch.float32, torch.float64) else eps / 2
    allowed = roundings * eps * exact.abs() + (x.shape[1] * 2**-24 + roundings * inexact) * size
    return float(((y.double() - exact).abs() / allowed.clamp(min=1e-30)).max())


def strict(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Largest error over eps |y| + K 2^-24 (|x| |W|ᵀ): one rounding of the result, and sums in float32."""
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = torch.finfo(y.dtype).eps * exact.abs() + x.shape[1] * 2**-24 * size
    return float(((y.double() - exact).abs() / allowed.clamp(min=1e-30)).max())


def check_runtime(op, weight, tokens, dtypes) -> None:
    """That a runtime layout turns back bit for bit, rows and single ones are those of the weight, products strict."""
    module = layer(weight, bias=True)
    portable, dense = module.portable(), weight.dequantize()
    runtime = op.prepare(portable, module.spec)
    restored = op.restore(runtime, module.spec)
    assert restored.keys() == portable.keys()
    for name, tensor in portable.items():
        assert restored[name].dtype == tensor.dtype and torch.equal(restored[name], tensor)
    for dtype in dtypes:
        assert torch.equal(op.rows(runtime, module.spec, 0, len(dense), dtype), dense.to(dtype))
        picked = torch.tensor([len(dense) - 1, 0, len(dense) // 2])
        assert torch.equal(op.gather(runtime, module.spec, picked, dtype), dense[picked].to(dtype))
        for count in tokens:
            x, bias = activations(count, dense.shape[1], dtype), module.bias.to(dtype)
            y = op.run(x, runtime, module.spec, bias)
            assert y.dtype == dtype and y.shape == (count, len(dense))
            assert strict(y, x, dense, bias) <= 1
            assert strict(op.run(x, runtime, module.spec, None), x, dense) <= 1


needs_int4 = pytest.mark.skipif(not _runs(TorchInt4(), 4), reason="no fast int4 product on this processor")
needs_int8 = pytest.mark.skipif(not _runs(TorchInt8(), 8), reason="inexact int8 product on this processor")
