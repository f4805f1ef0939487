"""Packed layers made of parts compute what their parts say, and stay bit for bit what they are."""

import copy
import io
import pickle

import pytest
import torch

from tests.nested import NESTED
from trifold.core.errors import CheckpointError
from trifold.core.product import product
from trifold.formats import describe, digest, pack
from trifold.kernels import PackedEmbedding, PackedLinear, explain, resolve
from trifold.kernels.compose import Split

CPU = torch.device("cpu")


def layer(weight, bias=False):
    module = PackedLinear(describe(weight), bias, torch.float32)
    tensors = pack(weight)
    module.load_state_dict(tensors | ({"bias": torch.linspace(-1, 1, weight.shape[0])} if bias else {}))
    return module


def tokens(count, columns, dtype=torch.float32):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("name", NESTED)
def test_against_plain_products(name):
    weight = NESTED[name]
    module = layer(weight, bias=True)
    for count in (1, 3, 17):
        x = tokens(count, weight.shape[1])
        expected = product(weight, torch.float32)(x) + module.bias
        found = module(x)
        assert found.dtype == x.dtype and found.shape == (count, weight.shape[0])
        # a value may go to the other side of a boundary of its grid only behind another rounded factor
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["columns, a8", "sum, a6 static", "two deep", "rows, a8 fp8", "low rank"])
def test_other_dtypes_and_leading_dimensions(name):
    weight = NESTED[name]
    module = layer(weight, bias=True)
    for dtype, close in ((torch.bfloat16, 3e-2), (torch.float16, 3e-2), (torch.float64, 1e-4)):
        for lead in ((), (1,), (2, 0), (2, 3)):
            x = torch.randn(*lead, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
            y = module(x)
            assert y.dtype == dtype and y.shape == (*lead, weight.shape[0])
            if x.numel():
                expected = product(weight, torch.float32)(x.float()) + module.bias
                assert (y.float() - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize("name", NESTED)
def test_tensors_keep_their_names_and_bits(name):
    weight = NESTED[name]
    module, before = layer(weight), digest(pack(weight))
    assert list(module.state_dict()) and digest(module.state_dict()) == before
    x = tokens(3, weight.shape[1])
    y = module(x)
    assert digest(module.state_dict()) == digest(module.portable()) == before
    module(x)
    assert torch.equal(module.dequantize(), weight.dequantize())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y) and digest(other.state_dict()) == before
    for cast in (torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.bfloat16):
        assert digest(cast(copy.deepcopy(module)).state_dict()) == before


@pytest.mark.parametrize("name", [name for name in NESTED if ", a" not in name])
def test_gradients_reach_the_input_and_the_bias(name):
    weight = NESTED[name]
    module = layer(weight, bias=True)
    module.bias.requires_grad_()
    x = tokens(5, weight.shape[1]).requires_grad_()
    out = tokens(5, weight.shape[0])
    (module(x) * out).sum().backward()
    torch.testing.assert_close(x.grad, out @ weight.dequantize(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad, out.sum(0))


def test_gradients_pass_rounded_activations_straight():
    weight = NESTED["columns, a8"]
    x = tokens(5, 43).requires_grad_()
    layer(weight)(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(5, 43), rtol=1e-4, atol=1e-4)


def test_the_index_is_replaced_by_an_order_and_comes_back():
    for name in ("columns", "rows", "three rows", "one part", "an empty part"):
        spec, tensors = describe(NESTED[name]), pack(NESTED[name])
        own = {"weight": tensors["weight"]}
        assert digest(Split().restore(Split().prepare(own, spec), spec)) == digest(own)
        module = layer(NESTED[name])
        module(tokens(2, 43))
        assert "runtime_order" in dict(module.named_buffers()) and "weight" in module.state_dict()


def test_explain_speaks_of_each_part():
    choice = explain(describe(NESTED["columns, a8"]), torch.float32, "cpu")
    assert choice.op == "split" and not choice.rejected
    assert [part.op.split(".")[0] for part in choice.parts] == ["rounded_input", "weight_only"]
    assert choice.parts[1].op.startswith(("weight_only.halves_", "weight_only.dense"))
    assert explain(describe(NESTED["sum"]), torch.float32, "cpu").parts[1].op == "weight_only.low_rank"
    nested = explain(describe(NESTED["two deep"]), torch.float32, "cpu")
    assert [part.op for part in nested.parts[0].parts] == ["chain", "split"]
    with pytest.raises(TypeError, match="a sum has no op"):
        resolve(describe(NESTED["sum"]), torch.float32, CPU)


def test_a_token_that_is_no_number_spoils_no_other():
    module = layer(NESTED["columns, a8"])
    x = tokens(3, 43)
    x[1, 7] = torch.nan
    y = module(x)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], module(x[[0, 2]]))


def test_wrong_features_and_meta():
    module = layer(NESTED["two deep"])
    with pytest.raises(ValueError, match="x has 44 features"):
        module(torch.zeros(2, 44))
    assert module(torch.zeros(2, 43, device="meta")).shape == (2, 7)


def test_tensors_of_another_spec_are_refused():
    module = layer(NESTED["columns"])
    module.weight = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="weight is"):
        module(torch.zeros(1, 43))


def test_embeddings_too():
    weight = NESTED["two deep"]
    table = PackedEmbedding(describe(weight), torch.float32)
    table.load_state_dict(pack(weight))
    ids = torch.tensor([[2, 0], [6, 2]])
    assert torch.equal(table(ids), weight.dequantize()[ids])
