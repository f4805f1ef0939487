"""oneDNN's product with weights in its own order, and rows of a split that are put in their places."""

import copy

import pytest
import torch

from tests.nested import index
from trifold.core.canonical import Canonical, Chain, Dense, Identity, LowRank, Split
from trifold.core.product import product
from trifold.formats import describe, pack
from trifold.kernels import PackedLinear
from trifold.kernels.native import place as places
from trifold.kernels.weight_only.onednn import OneDNN

SHAPES = [(6, 42), (123, 431), (1, 7), (7, 1), (64, 96)]
CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def weights(rows, columns):
    rank = max(1, min(rows, columns) // 3)
    pivots = Split(0, index(rank, rows - rank), (Identity(rank), Dense(numbers(rows - rank, rank))))
    yield Dense(numbers(rows, columns))
    yield LowRank(numbers(rows, rank), numbers(rank, columns))
    yield Chain((pivots, Dense(numbers(rank, columns))))


def module_of(canonical: Canonical) -> PackedLinear:
    module = PackedLinear(describe(canonical), False, torch.bfloat16)
    module.load_state_dict(pack(canonical))
    return module


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_products_are_those_of_the_reference_and_the_tensors_come_back(rows, columns, tokens):
    for canonical in weights(rows, columns):
        module, x = module_of(canonical), numbers(tokens, columns, seed=1)
        found, expected = module(x).float(), product(canonical, torch.float32)(x.float())
        assert float((found - expected).norm()) <= 0.01 * float(expected.norm())
        assert torch.equal(module(x), module(x))
        kept = module.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in pack(canonical).items())
        assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_gradients_pass_through():
    for canonical in weights(24, 40):
        module, x = module_of(canonical), numbers(3, 40).requires_grad_()
        module(x.detach())  # first without, so that the kernel's own order is in place
        grad = numbers(3, 24, seed=2)
        module(x).backward(grad)
        expected = grad.float() @ canonical.dequantize()
        assert float((x.grad.float() - expected).norm()) <= 0.02 * float(expected.norm())


def test_what_it_does_not_take():
    op = OneDNN()
    floats = describe(Dense(torch.ones(3, 4)))
    assert "takes bfloat16 weights, not float32" in op.supports(floats, torch.bfloat16, CPU)
    assert op.supports(describe(Dense(torch.ones(0, 4).bfloat16())), torch.bfloat16, CPU) == "the weight is empty"
    module = module_of(Dense(torch.ones(3, 4)))
    assert module.choice(torch.bfloat16, "cpu").op == "weight_only.dense"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_columns_reach_their_places(monkeypatch, dtype, tokens):
    own, other = torch.tensor([4, 0, 2]), torch.tensor([3, 1])
    a, b = torch.randn(tokens, 3).to(dtype), torch.randn(tokens, 4).to(dtype)[:, 1:3]  # not contiguous
    expected = torch.empty(tokens, 5, dtype=dtype)
    expected[:, own], expected[:, other] = a, b
    found = torch.empty(tokens, 5, dtype=dtype)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(places, "_function", lambda size: None)
        found.fill_(-1)
        places.place(a, own, found)
        places.place(b, other, found)
        assert torch.equal(found, expected)
