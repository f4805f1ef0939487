import pytest
import torch
from packed_samples import GROUPS, WIDTHS, activations, excess, layer, needs_int4, quantized

from trifold.kernels.weight_only.blockwise import Blockwise
from trifold.kernels.weight_only.naive import Naive
from trifold.kernels.weight_only.torch_int4 import DENSE_FROM, TorchInt4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def run(op, module, x):
    bias = None if module.bias is None else module.bias.to(x.dtype)
    y = op.run(x, op.prepare(module.portable(), module.spec), module.spec, bias)
    assert y.dtype == x.dtype and y.shape == (len(x), module.out_features)
    return y


def check(op, module, weight, x):
    assert excess(run(op, module, x), x, weight, module.bias) <= 1


@pytest.mark.parametrize("op", [Naive(), Blockwise()], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [43, 172, 256])
def test_every_width_and_group_against_float64(op, dtype, in_features):
    for bits in WIDTHS:
        for group in GROUPS:
            weight = quantized(7, in_features, bits, group, bits % 2 == 0)
            check(op, layer(weight, bias=bits > 4), weight.dequantize(), activations(3, in_features, dtype))


@pytest.mark.parametrize("op", [Naive(), Blockwise()], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("out_features", [1, 7, 96])
def test_odd_shapes_against_float64(op, dtype, tokens, out_features):
    for in_features in (43, 172, 256):
        for symmetric in (True, False):
            weight = quantized(out_features, in_features, 4, 32, symmetric)
            check(op, layer(weight, True), weight.dequantize(), activations(tokens, in_features, dtype))


def test_several_blocks(monkeypatch):
    monkeypatch.setattr("trifold.kernels.rows._TILE", {"cpu": 64 * 43})
    weight = quantized(300, 43, 3, 16, False)
    for dtype in DTYPES:
        check(Blockwise(), layer(weight, True), weight.dequantize(), activations(5, 43, dtype))


def test_float64_activations_are_exact():
    weight, x = quantized(7, 43, 4, 16, False), activations(3, 43, torch.float64)
    expected = x @ weight.dequantize().double().T
    assert torch.allclose(run(Blockwise(), layer(weight), x), expected, rtol=1e-13, atol=1e-13)


def effective(weight, module):
    """The weight that torch's product stands for: scale and zero rounded to bfloat16."""
    op = TorchInt4()
    runtime = op.prepare(module.portable(), module.spec)
    pairs = runtime["scale_and_zero"].transpose(0, 1).double()
    step = weight.shape[1] // pairs.shape[1]
    scale, zero = pairs.repeat_interleave(step, dim=1).unbind(-1)
    shift = 8 - 2 ** (weight.scheme.bits - 1)
    return (weight.codes.double() + shift - 8) * scale + zero


@needs_int4
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group, in_features", [(32, 96), (64, 128), (128, 160), ("channel", 256), ("tensor", 64)])
def test_int4_against_float64(bits, symmetric, group, in_features):
    op = TorchInt4()
    for out_features in (16, 96, 144):
        weight = quantized(out_features, in_features, bits, group, symmetric)
        module = layer(weight, bias=True)
        assert op.supports(module.spec, torch.bfloat16, CPU) is None
        assert "float32" in op.supports({**module.spec, "scale_dtype": "float32"}, torch.bfloat16, CPU)
        stands_for, dense = effective(weight, module), weight.dequantize().double()
        # Only the rounding of the offset to bfloat16 separates what it stands for from the weight.
        shift = 8 - 2 ** (bits - 1)
        size = (weight.codes.double() + shift - 8).abs() + (0 if symmetric else 8)
        assert ((stands_for - dense).abs() <= size * 0.03 * 2**-8).all()
        if symmetric:
            assert torch.equal(stands_for, dense)
        for tokens in (1, 3, 17):
            x = activations(tokens, in_features, torch.bfloat16)
            assert excess(run(op, module, x), x, stands_for, module.bias, roundings=2) <= 1


def test_int4_takes_dense_tiles_for_many_tokens():
    weight = quantized(144, 160, 4, 128, False)
    module = layer(weight, bias=True)
    x = activations(DENSE_FROM + 3, 160, torch.bfloat16)
    check(TorchInt4(), module, weight.dequantize(), x)
    assert torch.equal(run(TorchInt4(), module, x), run(Blockwise(), module, x))


@pytest.mark.parametrize(
    "shape, bits, group, word",
    [
        ((96, 64), 5, 32, "bits=5"),
        ((96, 64), 1, 32, "bits=1"),
        ((7, 64), 4, 32, "out_features=7"),
        ((96, 172), 4, 64, "in_features=172"),
        ((96, 96), 4, 48, "group_size=48"),
        ((96, 64), 4, 16, "group_size=16"),
    ],
)
def test_int4_says_why_not(shape, bits, group, word):
    module = layer(quantized(*shape, bits, group, False))
    assert word in TorchInt4().supports(module.spec, torch.bfloat16, CPU)
