import copy
import io
import pickle

import pytest
import torch
from packed_samples import WIDTHS, activations, excess, layer, quantized
from torch import nn

from trifold.core.canonical import Quantized
from trifold.core.errors import CheckpointError, RecipeError
from trifold.formats import FORMATS, digest, format_for
from trifold.kernels import PackedLinear

KINDS = {  # name -> (weight, input bits, dtype whose op replaces the tensors)
    "int4": (quantized(96, 160, 4, 32, False, "float32"), None, torch.bfloat16),
    "int3": (quantized(16, 64, 3, "channel", True, "float16"), None, torch.bfloat16),
    "int8": (quantized(97, 43, 8, "channel", False, "float32"), 8, torch.float32),
    "tiles": (quantized(97, 43, 5, 16, False, "float32"), None, torch.bfloat16),
}


@pytest.fixture(params=KINDS)
def case(request):
    weight, input_bits, dtype = KINDS[request.param]
    return layer(weight, bias=True, input_bits=input_bits), weight, dtype


def bits_of(module):
    return digest(module.state_dict())


def stored(module):
    return sum(t.numel() * t.element_size() for t in module.buffers())


def test_forward_keeps_dtype_and_leading_dimensions(case):
    module, weight, _ = case
    columns = weight.shape[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for lead in ((), (1,), (3,), (2, 0), (2, 3, 5)):
            y = module(torch.randn(*lead, columns).to(dtype))
            assert y.dtype == dtype and y.shape == (*lead, weight.shape[0])


def test_state_dict_after_forward_is_the_one_before(case):
    module, weight, dtype = case
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    held = module.state_dict()
    for used in (dtype, torch.float32, dtype, torch.float16, dtype):
        module(activations(3, weight.shape[1], used))
        after = module.state_dict()
        assert list(after) == list(before)
        assert digest(after) == digest(before) == digest(held)


def test_the_runtime_layout_replaces_the_portable_tensors(case):
    module, weight, dtype = case
    portable = {name: id(t) for name, t in module.named_buffers()}
    module(activations(3, weight.shape[1], dtype))
    if module._holder is None:
        assert {name: id(t) for name, t in module.named_buffers()} == portable
        return
    assert not set(portable) & {name for name, _ in module.named_buffers()}
    assert stored(module) <= 2 * sum(t.numel() * t.element_size() for t in module.portable().values())
    assert set(portable) == {name for name, _ in module.named_buffers()}


def test_reading_or_setting_a_tensor_gives_up_the_runtime_layout(case):
    module, weight, dtype = case
    x = activations(3, weight.shape[1], dtype)
    y = module(x)
    held = module.canonical()
    assert torch.equal(getattr(held, "weight", held).codes, weight.codes)
    assert torch.equal(module.dequantize(), weight.dequantize())
    assert torch.equal(module(x), y)
    words, scale = module.weight.clone(), module.weight_scale.clone()
    module(x)
    module.weight_scale.mul_(2)
    assert torch.allclose(module(x) - module.bias.to(dtype), 2 * (y - module.bias.to(dtype)), rtol=0.1, atol=0.1)
    assert not torch.equal(module(x), y)
    module.weight_scale = scale
    assert torch.equal(module(x), y)
    module.weight = torch.zeros_like(words)
    assert not torch.equal(module(x), y)
    module.weight = nn.Parameter(words, requires_grad=False)
    assert torch.equal(module(x), y)
    assert set(dict(module.named_parameters())) == {"bias"}


def test_copies_compute_the_same(case):
    module, weight, dtype = case
    x = activations(3, weight.shape[1], dtype)
    y, before = module(x), bits_of(module)
    file = io.BytesIO()
    module(x)
    torch.save(module, file)
    file.seek(0)
    module(x)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
        copy.copy(module),
    ):
        assert torch.equal(other(x), y)
        assert torch.equal(module(x), y)
        assert bits_of(other) == before == bits_of(module)
        assert other.spec == module.spec


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casts_change_the_bias_alone(case, cast):
    module, weight, dtype = case
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "bias"}
    module(activations(3, weight.shape[1], dtype))
    cast(nn.ModuleList([module]))
    after = module.state_dict()
    assert after.pop("bias").dtype == cast(torch.nn.Linear(1, 1)).bias.dtype
    assert digest(after) == digest(before)
    module.type(torch.float64)
    assert module.weight.dtype == torch.int32


def test_loading_replaces_what_a_runtime_layout_held(case):
    module, weight, dtype = case
    x = activations(3, weight.shape[1], dtype)
    y, state = module(x), {name: t.clone() for name, t in module.state_dict().items()}
    for assign in (False, True):
        other = PackedLinear(module.spec, True, torch.float32)
        other.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
        assert not other(x).any()
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), y)


def test_built_on_meta_and_loaded(case):
    module, weight, dtype = case
    with torch.device("meta"):
        empty = PackedLinear(module.spec, True, torch.bfloat16)
    assert {t.device.type for t in (*empty.buffers(), *empty.parameters())} == {"meta"}
    assert empty.bias.dtype == torch.bfloat16 and not empty.bias.requires_grad
    x = activations(3, weight.shape[1], dtype)
    assert empty.to_empty(device="cpu").weight.device.type == "cpu"
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))
    assert module.to("meta")(x.to("meta")).shape == (3, weight.shape[0])


def test_inference_mode_leaves_a_module_that_trains(case):
    module, weight, dtype = case
    x = activations(3, weight.shape[1], dtype)
    with torch.inference_mode():
        y = module(x)
    assert torch.equal(module(x), y)
    x.requires_grad_()
    module(x).sum().backward()
    module.load_state_dict(module.state_dict())
    assert x.grad is not None


@pytest.mark.parametrize("bits", WIDTHS)
def test_gradient_is_that_of_the_dequantised_linear(bits, monkeypatch):
    monkeypatch.setattr("trifold.kernels.rows._TILE", {"cpu": 64 * 64})
    for input_bits in (None, 8):
        weight = quantized(144, 64, bits, "channel", False)
        module, dense = layer(weight, True, input_bits), weight.dequantize()
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = activations(6, 64, dtype).reshape(2, 3, 64).requires_grad_()
            grad = activations(6, 144, dtype).reshape(2, 3, 144)
            module(x).backward(grad)
            assert x.grad.dtype == dtype
            assert excess(x.grad.reshape(6, 64), grad.reshape(6, 144), dense.T, None, roundings=3) <= 1


def test_the_backward_pass_holds_no_dense_weight():
    module = layer(quantized(96, 160, 4, 32, False))
    x = activations(3, 160, torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    module.float()
    assert not kept
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_a_bias_may_be_trained():
    module = layer(quantized(7, 43, 4, 16, False), bias=True)
    module.bias.requires_grad_()
    module(activations(3, 43)).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((7,), 3.0))


def test_autocast_does_not_reach_float32_activations():
    module, x = layer(quantized(96, 160, 4, 32, False), bias=True), activations(3, 160)
    y = module(x)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = module(x)
    assert again.dtype == torch.float32 and torch.equal(again, y)
    assert calls == [1]


def test_wrong_inputs_are_named():
    module = layer(quantized(7, 43, 4, 16, False))
    with pytest.raises(ValueError, match="x has 86 features, the layer takes 43"):
        module(torch.zeros(2, 86))
    with pytest.raises(TypeError, match="int64"):
        module(torch.zeros(2, 43, dtype=torch.int64))
    with pytest.raises(RecipeError, match="input bits=9"):
        PackedLinear({**module.spec, "input": {"bits": 9}}, False, torch.float32)
    with pytest.raises(RecipeError, match="unknown format"):
        PackedLinear({**module.spec, "format": "int5"}, False, torch.float32)


def test_tensors_of_another_spec_are_refused():
    module = layer(quantized(7, 43, 4, 16, False, "float32"))
    module.weight_scale = module.weight_scale.bfloat16()
    with pytest.raises(CheckpointError, match=r"weight_scale is torch\.bfloat16"):
        module(torch.zeros(1, 43))
    module.weight_scale = torch.ones(7, 2)
    with pytest.raises(CheckpointError, match=r"\(7, 2\)"):
        module(torch.zeros(1, 43))


def test_repr_names_the_spec():
    text = repr(layer(quantized(7, 43, 4, 16, False), bias=True, input_bits=8))
    assert "bits=4" in text and "shape=[7, 43]" in text and "bias=True" in text and "'bits': 8" in text


def test_pages_of_a_mapped_file_leave_and_come_back(tmp_path):
    """Values stay, also those that were changed in memory after the file was mapped."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from trifold.kernels.pages import page_out

    save_file({"weight": torch.arange(2**20, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        tensor = file.get_tensor("weight")
    tensor[70_000] = -1
    for _ in range(2):
        page_out(tensor)
        expected = torch.arange(2**20, dtype=torch.int32)
        expected[70_000] = -1
        assert torch.equal(tensor, expected)
    page_out(torch.arange(5))  # torch's own memory


def test_a_bound_call_ends_with_the_tensors_it_was_bound_to():
    first, second = quantized(32, 64, 4, 32, False), quantized(32, 64, 4, 32, True)
    module, x = layer(first), activations(2, 64)
    other = Quantized(second.codes, first.scale * 2, first.zero_point, first.scheme)
    before = module(x)
    module.load_state_dict(FORMATS.get(format_for(other)).pack(other))
    assert torch.allclose(module(x), x @ other.dequantize().T, atol=1e-4) and not torch.equal(module(x), before)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module(x.bfloat16()).dtype == torch.bfloat16
