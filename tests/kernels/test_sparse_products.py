"""Sparse weights through the ops that any format runs on."""

import pytest
import torch
from packed_samples import activations, excess, layer

from tests.sparse_samples import KINDS, sparse_weight
from trifold.kernels.dispatch import explain
from trifold.kernels.rows import dequantize_rows
from trifold.kernels.sparse.naive import Naive as Survivors
from trifold.kernels.weight_only.blockwise import Blockwise
from trifold.kernels.weight_only.naive import Naive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_ops_are_the_dense_product(kind, dtype, monkeypatch):
    pattern, values, _ = KINDS[kind]
    monkeypatch.setattr("trifold.kernels.rows._TILE", {"cpu": 64 * 136})  # several blocks of rows
    weight = sparse_weight((130, 136), pattern, values)
    module = layer(weight, bias=True)
    for tokens in (1, 5, 33):
        x = activations(tokens, 136, dtype)
        for op in (Naive(), Blockwise(), Survivors()):
            assert op.supports(module.spec, dtype, torch.device("cpu")) is None
            y = op.run(x, module.portable(), module.spec, module.bias.to(dtype))
            assert excess(y, x, weight.dequantize(), module.bias, 2) <= 1
        assert excess(module(x), x, weight.dequantize(), module.bias, 2) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_the_choice_of_the_op(kind):
    pattern, values, _ = KINDS[kind]
    weight = sparse_weight((65, 136), pattern, values)
    module = layer(weight)
    for start, stop in ((0, 65), (64, 65), (3, 40)):
        found = dequantize_rows(module.portable(), module.spec, start, stop, torch.bfloat16)
        assert torch.equal(found, weight.dequantize()[start:stop].bfloat16())
    assert explain(module.spec, torch.float64, "cpu").op == "weight_only.blockwise"


def test_the_gradient_at_the_input():
    weight = sparse_weight((65, 136), *KINDS["group int4"][:2])
    module, x = layer(weight), activations(3, 136).requires_grad_()
    module(x).square().sum().backward()
    y = x.detach() @ weight.dequantize().T
    torch.testing.assert_close(x.grad, 2 * y @ weight.dequantize(), rtol=1e-4, atol=1e-5)
