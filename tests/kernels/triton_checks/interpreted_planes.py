"""Values of the bit-plane kernels, in Triton's interpreter. Run by `test_triton.py`, in a process of its own."""

import pytest
import torch
from packed_samples import OTHERS, WIDTHS, activations, excess, layer, other, quantized

from trifold.core.canonical import Quantized
from trifold.core.scheme import Scheme
from trifold.formats import digest
from trifold.kernels.weight_only.naive import Naive
from trifold.kernels.weight_only.planes import configs, ops
from trifold.kernels.weight_only.planes.layout import layout_of
from trifold.kernels.weight_only.planes.op import PlaneGemm, arguments
from trifold.kernels.weight_only.planes.unpacking import INTERPRETED

assert INTERPRETED.value
HALF = (torch.float16, torch.bfloat16)


def run(weight, x, bias=False):
    module = layer(weight, bias)
    tensors = PlaneGemm().prepare(module.portable(), module.spec)
    return PlaneGemm().run(x, tensors, module.spec, module.bias.to(x.dtype) if bias else None)


def check(weight, x, bias=False):
    y = run(weight, x, bias)
    assert y.dtype == x.dtype and y.shape == (len(x), weight.shape[0])
    assert excess(y, x, weight.dequantize(), layer(weight, bias).bias) <= 1
    return y


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits):
    for number, (dtype, group) in enumerate((dtype, group) for dtype in HALF for group in (32, 96, 128, "channel")):
        shape = [(7, 43), (33, 172), (1, 300), (65, 600)][number % 4]
        check(quantized(*shape, bits, group, (bits + number) % 2 == 0), activations(1 + number, shape[1], dtype), True)


@pytest.mark.parametrize("scheme", OTHERS, ids=str)
def test_every_grid(scheme):
    for dtype, group, shape in ((HALF[0], 32, (33, 172)), (HALF[1], 128, (7, 300)), (HALF[0], "tensor", (70, 130))):
        for scale_dtype in ("bfloat16", "float16", "float32"):
            check(other(*shape, group, scale_dtype, **scheme), activations(3, shape[1], dtype), True)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_every_configuration(bits):
    weight = quantized(70, 300, bits, 64, False)
    for tokens in (8, 9, 17, 33, 65):
        check(weight, activations(tokens, 300, HALF[tokens % 2]))


def test_more_tokens_at_once_where_that_is_work_enough(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "choose_for", lambda *a: seen.append(configs.choose_for(*a)) or seen[-1])
    for weight in (quantized(70, 172, 4, 64, False), other(70, 172, 64, **OTHERS[3])):
        check(weight, activations(130, 172, torch.bfloat16), True)
    assert [config.bm for config in seen] == [128, 128]


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_shares_are_added_up_in_their_order(bits, monkeypatch):
    weight = quantized(70, layout_of(bits).tile * 5 - 7, bits, 128, False)
    x = activations(3, weight.shape[1], torch.float16)
    alone = run(weight, x)
    monkeypatch.setattr(ops, "share", lambda *_: 3)  # the last program has one tile of five
    first, second = check(weight, x), run(weight, x)
    assert torch.equal(first, second)
    assert torch.allclose(first, alone, rtol=1e-2, atol=1e-2)
    monkeypatch.setattr(ops, "share", lambda *_: 9)  # four of them have none
    check(weight, x)


def test_activations_of_any_magnitude():
    weight = quantized(33, 300, 4, 64, False)
    for magnitude in (2.0**-100, 1e-30, 1e-6, 1.0, 3e4, 1e30, 2.0**100):
        x = activations(5, 300, torch.float32)
        x[1] *= torch.linspace(0, 1, 300) ** 4  # small ones beside large ones
        x[2] = 0
        x[3, 7] = 100
        check(weight, (x * magnitude).bfloat16())
    assert run(weight, torch.zeros(2, 300, dtype=torch.float16)).eq(0).all()


def test_the_largest_codes_and_activations():
    scheme = Scheme(8, 128, False)
    scale, zero = torch.ones(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.uint8)
    weight = Quantized(torch.full((3, 512), 255, dtype=torch.uint8), scale, zero, scheme)
    check(weight, torch.full((2, 512), 65504 / 2**17, dtype=torch.bfloat16))
    check(weight, torch.full((2, 512), 2e33, dtype=torch.bfloat16))


def test_what_is_no_number_spreads_to_its_token_alone():
    weight = quantized(33, 300, 4, 64, True)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = activations(3, 300, torch.float16)
        x[1, 5] = bad
        y = run(weight, x)
        assert not y[1].isfinite().any()
        assert torch.equal(y[::2], run(weight, x.nan_to_num(0, 0, 0))[::2])


@pytest.mark.parametrize("bits", [2, 5, 7])
def test_rows(bits):
    weights = [quantized(130, 172, bits, 32, False), other(70, 300, "channel", **OTHERS[bits % 4])]
    for weight in weights:
        module = layer(weight)
        tensors = PlaneGemm().prepare(module.portable(), module.spec)
        for dtype in (torch.float16, torch.float32):
            rows = ops.plane_rows(
                **arguments(tensors, module.spec), in_features=weight.shape[1], start=3, stop=69, dtype=dtype
            )
            assert torch.equal(rows, weight.dequantize()[3:69].to(dtype))


def test_many_tokens_take_dense_rows():
    weight = quantized(70, 172, 7, 32, False)
    x = activations(configs.dense_from(7), 172, torch.float16)
    module = layer(weight, True)
    tensors = PlaneGemm().prepare(module.portable(), module.spec)
    bias = module.bias.half()
    y = PlaneGemm().run(x, tensors, module.spec, bias)
    assert torch.allclose(y, Naive().run(x, module.portable(), module.spec, bias), rtol=2e-3, atol=2e-3)


def test_the_operators_are_as_torch_wants_them():
    weight = quantized(7, 43, 3, 32, False)
    module = layer(weight)
    known = arguments(PlaneGemm().prepare(module.portable(), module.spec), module.spec)
    checks = ("test_schema", "test_faketensor")
    x = activations(2, 43, torch.float16)
    torch.library.opcheck(ops.plane_linear, (x,), known | {"bias": None}, test_utils=checks)
    more = {"in_features": 43, "start": 0, "stop": 7, "dtype": torch.float16}
    torch.library.opcheck(ops.plane_rows, (), known | more, test_utils=checks)


def test_a_layer_that_runs_on_it():
    weight = quantized(33, 300, 3, 64, False)
    module = layer(weight, True)
    before = digest(module.portable())
    x = activations(5, 300, torch.float16)
    module._ops[x.dtype, x.device] = PlaneGemm()  # what the dispatch chooses on a GPU
    y = module(x)
    assert excess(y, x, weight.dequantize(), module.bias) <= 1
    assert {name for name, _ in module.named_buffers()} == {
        f"runtime_{n}" for n in ("plane0", "plane1", "scale", "zero")
    }
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), y)
    x.requires_grad_()
    module(x).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).half().expand(5, -1), rtol=1e-2, atol=1e-2)
    assert digest(module.portable()) == before
