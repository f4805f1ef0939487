import pytest
import torch

from tests.nested import NESTED, dense, index, low_rank, rounded
from trifold.core.canonical import Chain, Dense, LowRank, Quantized, RoundedInput, Split, Sum, with_rounded_input
from trifold.core.inputs import InputScheme, round_input
from trifold.core.product import product

INT8, STATIC = InputScheme(8), InputScheme(8, static=True)
PLAIN = [name for name in NESTED if ", " not in name]


def x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PLAIN)
def test_without_rounding_it_is_the_product_with_the_dequantised_weight(name):
    weight = NESTED[name]
    for lead in ((1,), (3,), (2, 5)):
        tokens = x(*lead, weight.shape[1])
        found = product(weight, torch.float64)(tokens)
        torch.testing.assert_close(found, tokens @ weight.dequantize().double().T, rtol=1e-5, atol=1e-4)


def test_columns_are_rounded_where_they_meet_rounded_weights():
    places = index(41, 2)
    weight = Split(1, places, (rounded(7, 41, 8, "channel"), dense(7, 2)))
    tokens = x(5, 43)
    tokens[:, places == 1] *= 100
    found = product(with_rounded_input(weight, INT8), torch.float64)(tokens)
    own = tokens.clone()
    own[:, places == 0] = round_input(tokens[:, places == 0], INT8)
    expected = own @ weight.dequantize().double().T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    together = round_input(tokens, INT8) @ weight.dequantize().double().T
    assert (found - expected).norm() < 1e-3 * (together - expected).norm()


def test_a_residual_sees_the_activations_themselves():
    a, b = rounded(7, 43), low_rank(7, 43, 3)
    tokens = x(5, 43)
    found = product(with_rounded_input(Sum((a, b)), INT8), torch.float64)(tokens)
    expected = round_input(tokens, INT8) @ a.dequantize().double().T + tokens @ b.dequantize().double().T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_of_a_chain_the_last_factor_sees_them():
    chain = with_rounded_input(Chain((rounded(7, 5), rounded(5, 43))), INT8)
    assert isinstance(chain.parts[0], Quantized) and isinstance(chain.parts[1], RoundedInput)


def test_static_scales_are_each_parts_own():
    absmax, places = torch.tensor([1.0, 200.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1])
    columns = with_rounded_input(Split(1, places, (rounded(2, 2), rounded(2, 2))), STATIC, absmax)
    assert [float(part.scale) for part in columns.parts] == pytest.approx([3 / 127, 200 / 127])
    rows = with_rounded_input(Split(0, torch.tensor([0, 1]), (rounded(1, 4), rounded(1, 4))), STATIC, absmax)
    assert [float(part.scale) for part in rows.parts] == pytest.approx([200 / 127] * 2)
    with pytest.raises(ValueError, match="what calibration saw"):
        with_rounded_input(rounded(2, 4), STATIC)


def test_what_is_kept_in_16_bits_rounds_nothing():
    assert isinstance(with_rounded_input(dense(2, 3), INT8), Dense)
    assert isinstance(with_rounded_input(low_rank(2, 3, 1), INT8), LowRank)


def test_impossible_roundings():
    with pytest.raises(ValueError, match="a scale goes with a static"):
        RoundedInput(rounded(2, 3), STATIC)
    with pytest.raises(ValueError, match="a scale goes with a static"):
        RoundedInput(rounded(2, 3), INT8, torch.ones(1))
    with pytest.raises(ValueError, match="parts of a Sum"):
        RoundedInput(Sum((rounded(2, 3),)), INT8)
