import pytest
import torch

from trifold.core.canonical import Dense, Quantized, Split, with_rounded_input
from trifold.core.errors import RecipeError
from trifold.core.inputs import InputScheme, quantize_input
from trifold.core.method import LayerProblem
from trifold.core.product import product
from trifold.core.scheme import Scheme
from trifold.quantizers import RTN, LLMInt8

INT8, CHANNEL = InputScheme(8), Scheme(8, "channel", True, "float32")


def solve(method, weight, sample, scheme=CHANNEL):
    return method.solve(LayerProblem({"a": weight}, {"a": scheme}, sample=sample)).canonical["a"]


def outliers(tokens=64, columns=43, places=(3, 17), factor=40.0, seed=0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, list(places)] *= factor
    return x


def test_two_tokens_by_hand():
    x = torch.tensor([[1.0, -2.0, 40.0], [0.5, 3.0, -30.0]])
    weight = torch.tensor([[0.2, 0.4, 0.05], [-0.1, 0.3, -0.02]])
    found = solve(LLMInt8(dtype="float32"), weight, x)
    assert isinstance(found, Split) and found.index.tolist() == [0, 0, 1]
    rounded, kept = found.parts
    assert (rounded.codes.int() - 128).T.tolist() == [[64, -42], [127, 127]]
    assert quantize_input(x[:, :2], INT8)[0].tolist() == [[64, -127], [21, 127]]
    assert torch.equal(kept.values, weight[:, 2:])
    y = product(with_rounded_input(found, INT8), torch.float32)(x)
    expected = torch.tensor([[1.403162, -1.499994], [-0.200006, 1.450784]])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    true = x @ weight.T
    plain = product(with_rounded_input(solve(LLMInt8(threshold=0), weight, x), INT8), torch.float32)(x)
    assert float((y - true).abs().max()) == pytest.approx(0.00316, abs=5e-6)
    assert float((plain - true).abs().max()) == pytest.approx(0.0834, abs=5e-5)


def test_the_threshold_belongs_to_the_outliers():
    x = torch.tensor([[6.0, 5.999, -6.0, 0.0]])
    assert solve(LLMInt8(), torch.randn(3, 4), x).index.tolist() == [1, 0, 1, 0]


def test_without_outliers_it_is_plain_rounding():
    weight, x = torch.randn(7, 43), outliers(factor=1)
    plain = RTN("minmax").solve(LayerProblem({"a": weight}, {"a": CHANNEL})).canonical["a"]
    for method, sample in ((LLMInt8(), x), (LLMInt8(threshold=0), 100 * x)):
        found = solve(method, weight, sample)
        assert isinstance(found, Quantized)
        assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)


def test_with_nothing_but_outliers_it_is_dense():
    weight = torch.randn(7, 43).bfloat16().float()
    found = solve(LLMInt8(), weight, torch.full((3, 43), 7.0))
    assert isinstance(found, Dense) and torch.equal(found.dequantize(), weight)
    one = torch.full((3, 43), 7.0)
    one[:, 5] = 0  # a column alone is not worth the codes
    assert isinstance(solve(LLMInt8(), weight, one), Dense)


def test_how_many_tokens_it_takes():
    x = torch.ones(100, 5)
    x[:6, 1], x[:5, 2], x[:1, 3] = 8, 8, 8
    weight = torch.randn(3, 5)
    assert solve(LLMInt8(), weight, x).index.tolist() == [0, 1, 0, 0, 0]  # six of a hundred
    assert solve(LLMInt8(positions=0.05), weight, x).index.tolist() == [0, 1, 1, 0, 0]
    assert solve(LLMInt8(positions=0), weight, x).index.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 43, 5), (7, 3, 1), (5, 172, 64), (96, 64, 3)])
def test_odd_shapes_and_the_rest_is_untouched(rows, columns, tokens):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    found = solve(LLMInt8(), weight, outliers(tokens, columns, (2,), 1e4))
    assert found.shape == (rows, columns) and 2 in (found.index == 1).nonzero()
    assert torch.equal(found.dequantize()[:, found.index == 1], weight[:, found.index == 1])
    rounded = (found.dequantize() - weight).abs()
    assert (rounded <= 0.51 * found.parts[0].scale.float()).all()


def test_the_16_bits_are_the_closer_ones():
    x = torch.full((3, 4), 7.0)
    weight = torch.tensor([[1.0 + 2**-10, 1, 1, 1]] * 2)
    for scale, dtype in ((1.0, torch.float16), (2.0**20, torch.bfloat16), (0.0, torch.bfloat16)):
        assert solve(LLMInt8(), weight * scale, x).values.dtype == dtype
    assert solve(LLMInt8(dtype="bfloat16"), weight, x).values.dtype == torch.bfloat16


def test_linears_of_one_input_keep_the_same_columns():
    x = outliers()
    weights = {"a": torch.randn(7, 43), "b": torch.randn(1, 43)}
    solution = LLMInt8().solve(LayerProblem(weights, dict.fromkeys(weights, CHANNEL), sample=x))
    a, b = (solution.canonical[name] for name in weights)
    assert torch.equal(a.index, b.index) and set((a.index == 1).nonzero().flatten().tolist()) == {3, 17}
    assert solution.events["a"] == {"llm_int8": {"outliers": 2, "inputs": 43}}


def test_it_beats_plain_rounding_where_there_are_outliers():
    x, weight = outliers(512), torch.randn(32, 43, generator=torch.Generator().manual_seed(2))
    error = {}
    for name, method in (("plain", LLMInt8(threshold=0)), ("kept", LLMInt8())):
        y = product(with_rounded_input(solve(method, weight, x), INT8), torch.float32)(x)
        error[name] = float((y - x @ weight.T).norm())
    assert error["kept"] < 0.1 * error["plain"]


@pytest.mark.parametrize("settings", [{"threshold": -1.0}, {"threshold": float("inf")}, {"positions": 1.5}])
def test_impossible_settings(settings):
    with pytest.raises(RecipeError):
        LLMInt8(**settings)
