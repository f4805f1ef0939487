"""Tables, 8-bit floats and real zero-points on the weight-only ops, in embeddings and in modules."""

import copy

import pytest
import torch
from packed_samples import GROUPS, OTHERS, activations, excess, layer, needs_int4, other, quantized

from trifold.core.scheme import Scheme
from trifold.formats import FORMATS, digest, format_for
from trifold.kernels import PackedEmbedding, PackedLinear, explain
from trifold.kernels.rows import DECODERS, dequantize_rows
from trifold.kernels.weight_only.blockwise import Blockwise
from trifold.kernels.weight_only.naive import Naive
from trifold.kernels.weight_only.torch_int4 import TorchInt4
from trifold.kernels.weight_only.torch_int8 import DENSE_FROM, TorchInt8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
SCHEMES = pytest.mark.parametrize("scheme", OTHERS, ids=str)


@SCHEMES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [Naive(), Blockwise()], ids=lambda op: op.name)
def test_against_float64_on_odd_shapes(op, scheme, dtype, monkeypatch):
    monkeypatch.setattr("trifold.kernels.rows._TILE", {"cpu": 64 * 43})
    for (rows, columns), group in [((1, 2), 1), ((7, 43), 16), ((97, 172), 100), ((33, 256), "channel")]:
        weight = other(rows, columns, group, **scheme)
        module = layer(weight, bias=True)
        for tokens in (1, 17):
            x = activations(tokens, columns, dtype)
            y = op.run(x, module.portable(), module.spec, module.bias.to(dtype))
            assert y.dtype == dtype and excess(y, x, weight.dequantize(), module.bias) <= 1


@SCHEMES
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_rows_equal_those_of_the_whole_weight(scheme, group, scale_dtype):
    for columns in (43, 128):
        weight = other(97, columns, group, scale_dtype, **scheme)
        module, whole = layer(weight), weight.dequantize()
        index = torch.tensor([96, 0, 5, 5, 31, 32, 63])
        found = DECODERS[module.spec["format"]](module.portable(), module.spec, index)
        assert torch.equal(found.dequantize(), whole[index])
        for dtype in (*DTYPES, torch.float64):
            for start, stop in ((0, 97), (64, 97), (33, 66)):
                part = dequantize_rows(module.portable(), module.spec, start, stop, dtype)
                assert part.dtype == dtype and torch.equal(part, whole[start:stop].to(dtype))


@SCHEMES
@pytest.mark.parametrize("group", [16, "tensor"])
def test_an_embedding_looks_its_rows_up(scheme, group):
    weight, ids = other(97, 43, group, **scheme), torch.tensor([[0, 96, 5], [5, 33, 64]])
    form = FORMATS.get(format_for(weight))
    for dtype in DTYPES:
        table = PackedEmbedding(form.describe(weight), dtype)
        table.load_state_dict(form.pack(weight))
        assert torch.equal(table(ids), weight.dequantize()[ids].to(dtype))


@SCHEMES
def test_a_module_keeps_its_bytes(scheme):
    """Whatever it ran on, whatever it was cast to: state_dict has the portable names, dtypes and bytes."""
    weight = other(96, 160, 32, **scheme)
    module = layer(weight, bias=True)
    before = digest(FORMATS.get(format_for(weight)).pack(weight))
    for dtype in (torch.bfloat16, torch.float32):
        module.to(dtype)
        module(activations(3, 160, dtype))
        state = module.state_dict()
        assert digest({name: state[name] for name in module._layout}) == before
    other_one = PackedLinear(module.spec, True, torch.float32)
    other_one.load_state_dict(copy.deepcopy(module).state_dict())
    x = activations(3, 160)
    assert torch.equal(other_one(x), module(x))
    x.requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(3, 160), rtol=1e-4, atol=1e-4)


def test_choices(no_compiler):
    for scheme in OTHERS[1:]:
        spec = layer(other(96, 160, 32, **scheme)).spec
        for dtype in DTYPES:
            choice = explain(spec, dtype, "cpu")
            assert choice.op == "weight_only.blockwise"
            assert "takes format int" in choice.rejected["weight_only.torch_int8"]


@needs_int4
def test_torchs_int4_product_takes_real_zero_points(no_compiler):
    for columns, group in ((160, 32), (256, "channel"), (64, "tensor")):
        weight = other(96, columns, group, **OTHERS[0])
        module = layer(weight, bias=True)
        assert explain(module.spec, torch.bfloat16, "cpu").op == "weight_only.torch_int4"
        runtime = TorchInt4().prepare(module.portable(), module.spec)
        assert digest(TorchInt4().restore(runtime, module.spec)) == digest(module.portable())
        pairs = runtime["scale_and_zero"].transpose(0, 1).double()
        scale, zero = pairs.repeat_interleave(columns // pairs.shape[1], dim=1).unbind(-1)
        stands_for = (weight.codes.double() - 8) * scale + zero
        assert ((stands_for - weight.dequantize()).abs() <= 8 * 0.03 * 2**-8).all()
        for tokens in (1, 3, 17):
            x = activations(tokens, columns, torch.bfloat16)
            y = TorchInt4().run(x, runtime, module.spec, module.bias.bfloat16())
            assert excess(y, x, stands_for, module.bias, roundings=2) <= 1


needs_int8pack = pytest.mark.skipif(
    TorchInt8().supports(layer(quantized(16, 32, 8, "channel", True)).spec, torch.bfloat16, CPU) is not None,
    reason="no fast int8 product on this processor",
)


@needs_int8pack
@pytest.mark.parametrize("group", ["channel", "tensor", 1000])
@pytest.mark.parametrize("out_features, in_features", [(1, 32), (7, 64), (97, 96), (144, 160)])
def test_torchs_int8_product_against_float64(group, out_features, in_features, no_compiler):
    weight, op = quantized(out_features, in_features, 8, group, True), TorchInt8()
    module = layer(weight, bias=True)
    assert explain(module.spec, torch.bfloat16, "cpu").op == op.name
    runtime = op.prepare(module.portable(), module.spec)
    assert digest(op.restore(runtime, module.spec)) == digest(module.portable())
    for tokens in (1, 3, 17, DENSE_FROM - 1, DENSE_FROM):
        x = activations(tokens, in_features, torch.bfloat16)
        y = op.run(x, runtime, module.spec, module.bias.bfloat16())
        assert y.dtype == x.dtype and excess(y, x, weight.dequantize(), module.bias, roundings=2) <= 1
    assert torch.equal(op.rows(runtime, module.spec, 0, out_features, torch.float32), weight.dequantize())


@pytest.mark.parametrize(
    "scheme, columns, word",
    [
        (Scheme(8, "channel", False), 64, "symmetric=False"),
        (Scheme(4, "channel", True), 64, "bits=4"),
        (Scheme(8, 32, True), 64, "group_size=32"),
        (Scheme(8, "channel", True, "float32"), 64, "scale_dtype=float32"),
        (Scheme(8, "channel", True), 40, "in_features=40"),
    ],
)
def test_the_int8_product_says_why_not(scheme, columns, word):
    weight = quantized(16, columns, scheme.bits, scheme.group_size, scheme.symmetric, scheme.scale_dtype)
    assert word in TorchInt8().supports(layer(weight).spec, torch.bfloat16, CPU)
