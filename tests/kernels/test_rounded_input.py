import pytest
import torch
from packed_samples import GROUPS, WIDTHS, activations, excess, layer, needs_int8, quantized

from trifold.core.canonical import with_rounded_input
from trifold.core.inputs import InputScheme, quantize_input
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import Scheme
from trifold.formats import describe, digest, pack
from trifold.kernels import PackedLinear, explain
from trifold.kernels.rounded_input.blockwise import Blockwise
from trifold.kernels.rounded_input.naive import Naive
from trifold.kernels.rounded_input.torch_fp8 import TorchFP8
from trifold.kernels.rounded_input.torch_int8 import TorchInt8, integer_product
from trifold.quantizers.rtn import round_to_nearest

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(op, module, x):
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return op.run(x, op.prepare(module.portable(), module.spec), module.spec, bias)


def rounded(x, bits=8):
    codes, scale = quantize_input(x, InputScheme(bits))
    return codes.double() * scale.double()


@needs_int8
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("in_features", [2, 43, 172, 256])
@pytest.mark.parametrize("out_features", [1, 7, 96])
def test_integer_part_is_exact(tokens, in_features, out_features):
    for symmetric in (True, False):
        weight = quantized(out_features, in_features, 8, "channel", symmetric)
        module = layer(weight, input_bits=8)
        runtime = TorchInt8().prepare(module.portable(), module.spec)
        codes, _ = quantize_input(activations(tokens, in_features), InputScheme(8))
        zero = torch.full((out_features, 1), 128) if symmetric else weight.zero_point.long()
        product = integer_product(codes, runtime["codes"], runtime.get("offset"))
        assert product.dtype == torch.int32
        assert torch.equal(product.long(), codes.long() @ (weight.codes.long() - zero).T)


@needs_int8
def test_integer_part_is_exact_at_the_extremes():
    x = torch.full((2, 512), 127, dtype=torch.int8)
    for code, zero in ((0, 255), (255, 0)):
        codes = torch.full((3, 512), code - 128, dtype=torch.int8)
        offset = torch.full((3,), 128 - zero, dtype=torch.int32)
        assert (integer_product(x, codes, offset) == 512 * 127 * (code - zero)).all()


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_against_float64(dtype, group):
    for out_features, in_features in ((1, 43), (7, 172), (96, 256)):
        for symmetric in (True, False):
            weight = quantized(out_features, in_features, 8, group, symmetric)
            module = layer(weight, bias=True, input_bits=8)
            assert TorchInt8().supports(module.spec, dtype, CPU) is None
            for tokens in (1, 3, 17):
                x = activations(tokens, in_features, dtype)
                for op in (TorchInt8(), Naive()):
                    y = run(op, module, x)
                    assert y.dtype == dtype
                    assert excess(y, rounded(x), weight.dequantize(), module.bias) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_weight_and_any_input_width_by_blocks(dtype):
    for bits in WIDTHS:
        for group in GROUPS:
            weight = quantized(7, 172, bits, group, False)
            input_bits = max(bits, 2)
            module = layer(weight, bias=True, input_bits=input_bits)
            x = activations(3, 172, dtype)
            y = run(Blockwise(), module, x)
            assert y.dtype == dtype
            assert excess(y, rounded(x, input_bits), weight.dequantize(), module.bias, roundings=2) <= 1


def test_a_row_of_zeros_gives_the_bias():
    module = layer(quantized(7, 43, 8, "channel", False), bias=True, input_bits=8)
    assert torch.equal(module(torch.zeros(2, 43)), module.bias.expand(2, 7))


@pytest.mark.parametrize("in_features", [43, 44])
@pytest.mark.parametrize("symmetric", [True, False])
def test_runtime_layout_is_bijective(in_features, symmetric):
    weight = quantized(71, in_features, 8, "channel", symmetric)
    module, op = layer(weight, input_bits=8), TorchInt8()
    portable = module.portable()
    before = digest(portable)
    runtime = op.prepare(portable, module.spec)
    assert digest(portable) == before
    assert digest(op.restore(runtime, module.spec)) == before
    assert torch.equal(op.rows(runtime, module.spec, 3, 70, torch.float32), weight.dequantize()[3:70])


@pytest.mark.parametrize(
    "bits, group, input_bits, word",
    [(4, "channel", 8, "bits=4"), (8, "channel", 6, "input bits=6"), (8, 16, 8, "group_size=16")],
)
def test_says_why_not(bits, group, input_bits, word):
    module = layer(quantized(7, 64, bits, group, False), input_bits=input_bits)
    assert word in TorchInt8().supports(module.spec, torch.float32, CPU)


def test_refuses_sums_that_could_overflow():
    spec = {"format": "int", "shape": [1, 2**17], "bits": 8, "group_size": "channel", "symmetric": True}
    spec |= {"scale_dtype": "bfloat16", "input": {"bits": 8}}
    assert "overflow" in TorchInt8().supports(spec, torch.float32, CPU)


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_static_scale_is_used_by_every_op(dtype):
    scheme = InputScheme(8, static=True)
    for symmetric in (True, False):
        weight = quantized(7, 172, 8, "channel", symmetric)
        module = layer(weight, bias=True, input_bits=8)
        spec = {**module.spec, "input": scheme.to_dict()}
        for scale in (0.01, 0.05):
            static = torch.tensor([scale])
            tensors = {**module.portable(), "input_scale": static}
            x = activations(17, 172, dtype)
            codes, per_token = quantize_input(x, scheme, static)
            exact = codes.double() * per_token.double()
            assert (exact.abs() <= 127 * float(static)).all()
            for op, roundings in ((TorchInt8(), 1), (Naive(), 1), (Blockwise(), 2)):
                assert op.supports(spec, dtype, CPU) is None
                y = op.run(x, op.prepare(tensors, spec), spec, module.bias.to(dtype))
                assert excess(y, exact, weight.dequantize(), module.bias, roundings) <= 1
        assert digest(TorchInt8().restore(TorchInt8().prepare(tensors, spec), spec)) == digest(tensors)


def fp8_layer(rows, columns, group="channel", static=False):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    scheme = Scheme(8, group, grid="fp8_e4m3")
    held = round_to_nearest(weight, fit_ranges(weight, scheme), scheme)
    rounding = InputScheme(grid="fp8_e4m3", static=static)
    whole = with_rounded_input(held, rounding, torch.full((columns,), 3.0))
    module = PackedLinear(describe(whole), True, torch.float32)
    module.load_state_dict(pack(whole) | {"bias": torch.linspace(-1, 1, rows)})
    return module, held, rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_fp8_products_agree_with_the_simulation(dtype, static):
    op = TorchFP8()
    for rows, columns in ((1, 2), (7, 43), (97, 172)):
        module, held, rounding = fp8_layer(rows, columns, static=static)
        if op.supports(module.spec, dtype, CPU) is not None:
            pytest.skip("no FP8 product for this processor")
        for tokens in (1, 3, 17):
            x = activations(tokens, columns, dtype)
            codes, scale = quantize_input(x, rounding, module.portable().get("input_scale"))
            exact = codes.double() * scale.double()
            for runs, roundings in ((op, 1), (Naive(), 1), (Blockwise(), 2)):
                y = run(runs, module, x)
                assert y.dtype == dtype
                assert excess(y, exact, held.dequantize(), module.bias, roundings) <= 1


def test_dispatch_of_fp8_and_its_reasons():
    module, _, _ = fp8_layer(16, 32)
    choice = explain(module.spec, torch.float32, "cpu")
    assert choice.op in ("rounded_input.torch_fp8", "rounded_input.blockwise")
    op = TorchFP8()
    assert "group_size=16" in op.supports(fp8_layer(16, 32, 16)[0].spec, torch.float32, CPU)
    cuda = torch.device("cuda")
    assert "gives torch.bfloat16 on cuda" in op.supports(module.spec, torch.float16, cuda)
    assert "multiples of 16" in op.supports(fp8_layer(16, 43)[0].spec, torch.bfloat16, cuda)
    assert "not mps" in op.supports(module.spec, torch.bfloat16, torch.device("mps"))
    assert not torch.equal(module(torch.ones(1, 32)), fp8_layer(16, 32, static=True)[0](torch.full((1, 32), 9.0)))
