"""Compiled products of packed weights and rounded activations, against float64."""

import pytest
import torch
from packed_samples import GROUPS, activations, excess, layer, other, quantized

from trifold.core.inputs import InputScheme, quantize_input
from trifold.kernels import explain
from trifold.kernels.native import Library, lacking, load
from trifold.kernels.rounded_input.cpu_int8 import VARIANTS, CompiledInt8

RUNNABLE = [name for name in VARIANTS if lacking(name) is None and isinstance(load(name, 4), Library)]
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_vnni = pytest.mark.skipif(not RUNNABLE, reason="no AVX512-VNNI or no C compiler")


def assert_close_to_float64(weight, x, bits=8, scale=None):
    """That every variant is as near to float64 as sums in float32 let it be; x is rounded exactly as by torch."""
    module = layer(weight, bias=True, input_bits=bits)
    spec = module.spec if scale is None else module.spec | {"input": {"bits": bits, "static": True}}
    codes, steps = quantize_input(x, InputScheme(bits, static=scale is not None), scale)
    rounded, bias = codes.double() * steps.double(), module.bias.to(x.dtype)
    for variant in RUNNABLE:
        op = CompiledInt8(variant)
        assert op.supports(spec, x.dtype, CPU) is None
        tensors = module.portable() | ({} if scale is None else {"input_scale": scale})
        y = op.run(x, op.prepare(tensors, spec), spec, bias)
        assert y.dtype == x.dtype and y.shape == (len(x), len(weight.codes))
        assert excess(y, rounded, weight.dequantize(), bias.double()) <= 1


@needs_vnni
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 16), (1, 43), (7, 172), (70, 256), (131, 97)])
def test_against_float64(bits, shape):
    for group in GROUPS:
        for symmetric in (True, False):
            for tokens, dtype in zip((1, 5, 17), DTYPES, strict=True):
                assert_close_to_float64(quantized(*shape, bits, group, symmetric), activations(tokens, shape[1], dtype))


@needs_vnni
def test_fewer_bits_and_fixed_scales():
    weight = quantized(40, 100, 4, 32, False)
    for bits in (2, 5, 8):
        assert_close_to_float64(weight, activations(3, 100), bits)
        assert_close_to_float64(weight, activations(3, 100, torch.bfloat16), bits, torch.tensor([0.01]))  # saturates


@needs_vnni
def test_the_integer_part_is_exact_at_the_extremes():
    """All sums at their largest: anything that saturates or wraps would show."""
    for bits in (4, 8):
        weight = quantized(16, 4096, bits, "channel", False)
        for code, zero in ((0, 2**bits - 1), (2**bits - 1, 0)):
            weight.codes.fill_(code)
            weight.zero_point.fill_(zero)
            weight.scale.fill_(1)
            module = layer(weight, input_bits=8)
            for variant in RUNNABLE:
                op = CompiledInt8(variant)
                runtime = op.prepare(module.portable(), module.spec)
                y = op.run(torch.full((9, 4096), -127.0), runtime, module.spec, None)
                assert (y == -127 * 4096 * (code - zero)).all()


@needs_vnni
def test_tokens_of_zeros_and_nans_stay_alone():
    weight = quantized(33, 64, 4, 32, False)
    module, x = layer(weight, input_bits=8), activations(4, 64)
    x[1], x[2, 5] = 0, torch.nan
    for variant in RUNNABLE:
        op = CompiledInt8(variant)
        runtime = op.prepare(module.portable(), module.spec)
        y = op.run(x, runtime, module.spec, None)
        assert (y[1] == 0).all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()
        alone = torch.cat([op.run(x[i : i + 1], runtime, module.spec, None) for i in (0, 1, 3)])
        assert torch.equal(alone, y[[0, 1, 3]])


@needs_vnni
def test_the_same_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr("trifold.kernels.native._WORTH", 1)
    module, before = layer(quantized(203, 160, 4, 32, False), input_bits=8), torch.get_num_threads()
    try:
        for tokens in (1, 6):
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                op = CompiledInt8(RUNNABLE[0])
                runtime = op.prepare(module.portable(), module.spec)
                found.append(op.run(activations(tokens, 160), runtime, module.spec, None))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@needs_vnni
def test_a_layer_chooses_it_and_compiles():
    module = layer(quantized(48, 64, 4, 32, False), bias=True, input_bits=8).requires_grad_(False)
    assert explain(module.spec, torch.float32, "cpu").op == f"rounded_input.cpu_{RUNNABLE[0]}"
    x = activations(3, 64)
    expected = module(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)


def test_what_it_does_not_take():
    op = CompiledInt8("amx")
    for weight, why in (
        (quantized(16, 32, 3, 16, True), "4 and 8 bits, not 3"),
        (other(16, 32, 16, grid="nf4"), "grid='nf4'"),
        (other(16, 32, 16, zero_point="real"), "zero_point='real'"),
    ):
        assert why in op.supports(layer(weight, input_bits=8).spec, torch.float32, CPU)
    wide = layer(quantized(1, 16, 8, "channel", True), input_bits=8).spec | {"shape": [1, 2**17]}
    assert "overflow" in op.supports(wide, torch.float32, CPU)
