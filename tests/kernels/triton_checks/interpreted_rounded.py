"""Values of the kernels that round activations, in Triton's interpreter. Run by `test_triton.py`, in a process of its
own."""

import pytest
import torch
from packed_samples import activations, excess, layer, other, quantized

from trifold.core.canonical import with_rounded_input
from trifold.core.inputs import InputScheme, quantize_input, round_input
from trifold.formats import describe, pack
from trifold.kernels import PackedLinear
from trifold.kernels.rounded_input import triton_fp8, triton_product
from trifold.kernels.rounded_input.naive import input_scheme_of
from trifold.kernels.rounded_input.torch_int8 import TorchInt8
from trifold.kernels.rounded_input.triton_fp8 import TritonFP8
from trifold.kernels.rounded_input.triton_int8 import TritonInt8
from trifold.kernels.rounded_input.triton_product import round_tokens, rounded_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHECKS = ("test_schema", "test_faketensor")


def run(op, module, x, bias):
    tensors = op.prepare(module.portable(), module.spec)
    return op.run(x, tensors, module.spec, None if bias is None else bias.to(x.dtype))


def hard_tokens(columns, dtype):
    """Ordinary, tiny, huge, and all zero; ties; and what is no number."""
    x = activations(14, columns, torch.float32)
    x[1] *= 1e-30 if dtype != torch.float16 else 1e-6
    x[2] *= 1e30 if dtype != torch.float16 else 1e4
    x[3] = 0
    x[4] = -0.0
    x[5] = torch.arange(columns) % 255 - 127  # ties: the scale is 2
    x[5, 0] = 254
    x[6] = torch.linspace(-448, 448, columns)
    x[7] = 448 * 2.0 ** -torch.arange(columns).clamp(max=24).float()  # FP8's subnormals, and below
    x[8] = x[7] * 1.0625
    x[9] = 2.0**-149 if dtype == torch.float32 else 2.0**-24  # over 127 that is zero, or nearly
    x[10, columns // 2], x[11, -1], x[12, 0] = torch.nan, torch.inf, -torch.inf
    x[13] = torch.nan
    return x.to(dtype)


def same(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [InputScheme(8), InputScheme(3), InputScheme(8, "fp8_e4m3")], ids=str)
def test_rounding_is_that_of_the_scheme_bit_for_bit(scheme, dtype, monkeypatch):
    static = InputScheme(scheme.bits, scheme.grid, True)
    given = torch.tensor([0.0117])
    for columns in (1, 43, 300):
        x = hard_tokens(columns, dtype)
        for rounding, scale in ((scheme, None), (static, given)):
            codes, token, sums = round_tokens(x, rounding, scale)
            expected, scales = quantize_input(x, rounding, scale)
            assert same(token, scales) and same(codes.float(), expected.float())
            assert torch.equal(torch.signbit(codes.float())[:10], torch.signbit(expected.float())[:10])
            if scheme.grid == "int":
                assert torch.equal(sums, expected.sum(1, dtype=torch.int32))
    monkeypatch.setattr(triton_product, "_BLOCK", 128)  # in several pieces
    codes, token, sums = round_tokens(x, scheme, None)
    expected, scales = quantize_input(x, scheme, None)
    assert same(token, scales) and same(codes.float(), expected.float())


@pytest.mark.parametrize("shape", [(7, 43), (70, 300), (65, 256)], ids=str)
@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_values(shape, group):
    for number, (tokens, dtype) in enumerate(zip((1, 17, 65, 64, 16), DTYPES + DTYPES, strict=False)):
        symmetric, bias = number % 2 == 0, number % 3 > 0
        weight = quantized(*shape, 8, group, symmetric)
        module = layer(weight, bias, input_bits=(8, 6)[number % 2])
        x = activations(tokens, shape[1], dtype)
        y = run(TritonInt8(), module, x, module.bias)
        rounded = round_input(x.float(), input_scheme_of(module.spec))
        assert y.dtype == dtype and excess(y, rounded, weight.dequantize(), module.bias) <= 1
        if dtype == torch.float32 and number % 2 == 0:  # TorchInt8 takes 8 bits alone
            assert torch.equal(y, run(TorchInt8(), module, x, module.bias))


def fp8_layer(shape, group, static=False, bias=True):
    weight = other(*shape, group, "float32", grid="fp8_e4m3", bits=8)
    whole = with_rounded_input(weight, InputScheme(grid="fp8_e4m3", static=static), torch.full((shape[1],), 3.0))
    module = PackedLinear(describe(whole), bias, torch.float32)
    module.load_state_dict(pack(whole) | ({"bias": torch.linspace(-1, 1, shape[0])} if bias else {}))
    return module, weight


@pytest.mark.parametrize("shape", [(7, 43), (70, 300), (33, 512)], ids=str)
@pytest.mark.parametrize("group", ["channel", "tensor", 128])
def test_fp8_values(shape, group):
    for number, (tokens, dtype) in enumerate(zip((1, 17, 65), DTYPES, strict=True)):
        module, weight = fp8_layer(shape, group, number == 1, number > 0)
        x = activations(tokens, shape[1], dtype)
        y = run(TritonFP8(), module, x, module.bias)
        seen = round_input(x.float(), input_scheme_of(module.spec), module.portable().get("input_scale"))
        assert y.dtype == dtype and excess(y, seen, weight.dequantize(), module.bias) <= 1


def test_many_tokens_of_fp8_go_to_the_library_where_it_can(monkeypatch):
    module, _ = fp8_layer((16, 32), "channel")
    x, called = activations(3, 32, torch.bfloat16), []
    monkeypatch.setattr(triton_fp8, "_LIBRARY", 3)
    monkeypatch.setattr(triton_fp8.TorchFP8, "run", lambda *_: called.append(1))
    monkeypatch.setattr(triton_fp8.TorchFP8, "supports", lambda *_: None)
    run(TritonFP8(), module, x, module.bias)
    assert called == [1]
    monkeypatch.setattr(triton_fp8.TorchFP8, "supports", lambda *_: "it cannot")
    run(TritonFP8(), module, x, module.bias)
    run(TritonFP8(), module, x[:2], module.bias)
    assert called == [1]


def test_shares_are_added_up_in_their_order(monkeypatch):
    x = activations(3, 128 * 5 - 7, torch.bfloat16)
    whole = layer(quantized(70, x.shape[1], 8, "channel", False), True, input_bits=8)
    floats = [fp8_layer((70, x.shape[1]), group)[0] for group in ("channel", 128)]
    alone = [run(TritonInt8(), whole, x, whole.bias), *(run(TritonFP8(), m, x, m.bias) for m in floats)]
    for parts in (2, 9):
        monkeypatch.setattr(triton_product, "share", lambda *_, parts=parts: parts)
        assert torch.equal(run(TritonInt8(), whole, x, whole.bias), alone[0])  # integers
        for module, expected in zip(floats, alone[1:], strict=True):
            first = run(TritonFP8(), module, x, module.bias)
            assert torch.equal(first, run(TritonFP8(), module, x, module.bias))
            torch.testing.assert_close(first, expected, rtol=2e-2, atol=2e-2)


def test_the_largest_codes_are_summed_exactly():
    x = torch.full((2, 1000), -127.0)
    codes = torch.full((3, 1000), 127, dtype=torch.int8)
    offset, ones = torch.full((3,), 128, dtype=torch.int32), torch.ones(3)
    y = rounded_linear(x, codes, ones, offset, None, torch.ones(1), 8, 0)
    assert y.eq(-127 * 255 * 1000).all()


def test_a_token_that_is_no_number_spoils_no_other():
    for op, module in (
        (TritonInt8(), layer(quantized(33, 300, 8, "channel", False), input_bits=8)),
        (TritonFP8(), fp8_layer((33, 300), "channel", bias=False)[0]),
    ):
        x = activations(3, 300)
        x[1, 5] = torch.nan
        y = run(op, module, x, None)
        assert y[1].isnan().all() and y[::2].isfinite().all()


def test_the_operator_is_as_torch_wants_it():
    x, codes = activations(2, 43, torch.float16), torch.ones(7, 44, dtype=torch.int8)
    torch.library.opcheck(rounded_linear, (x, codes, torch.ones(7), None, None, None, 8, 0), test_utils=CHECKS)
