"""Layers that are given one tensor are computed by one call; nobody notices but the clock."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from tests.nested import dense, index, rounded
from trifold.compress.integration.modules import replace_modules
from trifold.core.canonical import Chain, Identity, Split
from trifold.formats import describe, pack
from trifold.kernels import shared_input
from trifold.kernels.native import VARIANTS, stages

pytestmark = pytest.mark.skipif(all(stages.lacking(name) is not None for name in VARIANTS), reason="no C compiler")
SIZE = 64
WEIGHTS = {
    "q": Chain((Split(0, index(24, 40), (Identity(24), dense(40, 24))), dense(24, SIZE))),
    "k": Chain((rounded(16, 8), rounded(8, SIZE, 3))),
    "v": rounded(16, SIZE),
    "o": rounded(SIZE, SIZE, 5),
}


class Attention(nn.Module):
    """q, k and v see x, o what becomes of them."""

    def __init__(self):
        super().__init__()
        for name, weight in WEIGHTS.items():
            self.add_module(name, nn.Linear(weight.shape[1], weight.shape[0], bias=name != "v"))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat([k, v, k, v], -1).sigmoid())


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of several computes."""
    found = []

    def bind(layers, variant):
        call = stages.bind(layers, variant)
        return lambda x, biases: found.append(len(layers)) or call(x, biases)

    monkeypatch.setattr(shared_input, "bind", bind)
    return found


def attention():
    torch.manual_seed(0)
    model = Attention()
    replace_modules(model, {name: describe(weight) for name, weight in WEIGHTS.items()})
    state = {f"{name}.{leaf}": t for name, weight in WEIGHTS.items() for leaf, t in pack(weight).items()}
    biases = {f"{name}.bias": torch.randn(len(m.bias)) for name, m in model.named_children() if m.bias is not None}
    model.load_state_dict(state | biases)
    return model


def alone(model):
    """The same model, whose layers know nothing of each other."""
    other = copy.deepcopy(model)
    for module in other.children():
        module.beside = None
    return other


def tokens(count=3, dtype=torch.float32):
    return torch.randn(2, count, SIZE, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_of_four_are_computed_at_once(calls, dtype):
    model = attention()
    expected = alone(model)
    with torch.no_grad():
        for count in (3, 1, 1, 5):
            assert torch.equal(model(tokens(count, dtype)), expected(tokens(count, dtype)))
    assert calls == [3, 3, 3]  # not the first: what belongs together has to be seen
    with torch.no_grad():
        many = tokens(100, dtype)
        assert torch.equal(model(many), expected(many)) and len(calls) == 3  # dequantised for as many


def test_saving_moving_and_copying(calls):
    model = attention()
    expected, x = alone(model), tokens()
    with torch.no_grad():
        model(x)
        y = model(tokens())
        assert torch.equal(y, expected(x)) and calls == [3]
        for name, weight in WEIGHTS.items():
            kept = model.get_submodule(name).state_dict()
            assert all(torch.equal(kept[leaf], tensor) for leaf, tensor in pack(weight).items())
        assert torch.equal(model(tokens()), y) and calls == [3, 3]  # bound again
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu", torch.float32)):
            del calls[:]
            assert torch.equal(other(x), y) and torch.equal(other(tokens()), y) and calls[-1:] == [3]
        single = copy.deepcopy(model.q)
        assert torch.equal(single(x), model.q(tokens()))


def test_what_nobody_comes_for_is_computed_apart(calls):
    model = attention()
    expected = alone(model)
    with torch.no_grad():
        model(tokens())
        model(tokens())
        for seed in range(3):
            x = tokens(seed + 1)
            assert torch.equal(model.q(x), expected.q(x)) and torch.equal(model.v(x), expected.v(x))
    assert calls == [3, 3, 2, 2]  # k is left alone once it was computed for nothing, the others go on


def test_a_tensor_that_changed_is_another_one(calls):
    model = attention()
    expected = alone(model)
    with torch.no_grad():
        model(tokens())
        x = tokens()
        model.q(x)
        x.add_(1)
        assert torch.equal(model.k(x), expected.k(x)) and torch.equal(model.v(x), expected.v(x))
        assert torch.equal(model.k(tokens()), expected.k(tokens()))


def test_one_tensor_again_and_again_makes_no_group_of_one_layer(calls):
    model = attention()
    expected = alone(model)
    with torch.no_grad():
        x = tokens()
        for _ in range(5):
            model.q(x)
        assert torch.equal(model.q(tokens()), expected.q(tokens())) and not calls
        for _ in range(5):
            model(x)
        assert torch.equal(model(tokens()), expected(tokens()))
    assert set(calls) == {3}


def test_other_weights_and_gradients_between_two_members(calls):
    model = attention()
    with torch.no_grad():
        model(tokens())
        model(tokens())
        x = tokens()
        model.q(x)
        model.k.load_state_dict({**model.k.state_dict(), "bias": torch.ones(16)})
        assert torch.equal(model.k(x), alone(model).k(x))  # not what was computed with q
        x = tokens(2)
        model.q(x)
    model.k.bias.requires_grad_()
    model.k(x).sum().backward()
    assert torch.equal(model.k.bias.grad, torch.full((16,), 4.0))


def test_nothing_holds_the_runtime_tensors_of_a_saved_layer(calls):
    model = attention()
    with torch.no_grad():
        model(tokens())
        model(tokens())
    held = [weakref.ref(tensor) for _, tensor in model.v.named_buffers()]
    model.v.state_dict()
    gc.collect()
    assert held and all(ref() is None for ref in held)


def test_hooks_gradients_and_inference_mode_go_layer_by_layer(calls):
    model = attention()
    expected, seen = alone(model), []
    handle = model.k.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens())
        assert torch.equal(model(tokens()), expected(tokens()))
    assert len(seen) == 2 and not calls
    handle.remove()
    for _ in range(2):
        x = tokens().requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None
    with torch.inference_mode():
        model(tokens())
        assert torch.equal(model(tokens()), expected(tokens()))
    assert not calls


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_layer_that_was_replaced_is_let_go(calls, name):
    model = attention()
    with torch.no_grad():
        model(tokens())
        model(tokens())
        gone = weakref.ref(model.get_submodule(name))
        setattr(model, name, nn.Linear(SIZE, 16))
        gc.collect()
        assert gone() is None
        expected = alone(model)
        for count in (1, 2):
            assert torch.equal(model(tokens(count)), expected(tokens(count)))
    assert calls == [3, 2, 2]
