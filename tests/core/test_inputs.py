"""Rounded activations: static scales and 8-bit floats (per-token integers are in test_scheme.py)."""

import pytest
import torch

from trifold.core.errors import RecipeError
from trifold.core.inputs import InputScheme, quantize_input, round_input

STATIC = InputScheme(8, static=True)
FP8 = InputScheme(grid="fp8_e4m3")
NAN = float("nan")


def test_a_static_scale_by_hand():
    scale = STATIC.static_scale(torch.tensor([0.5, 2.54, 0.0]))
    assert scale.dtype == torch.float32 and scale.shape == (1,) and torch.allclose(scale, torch.tensor([0.02]))
    x = torch.tensor([[2.54, -0.03, 0.05], [0.0, 0.0, 0.0], [-5.0, 0.011, 2.6]])
    codes, per_token = quantize_input(x, STATIC, scale)
    assert codes.tolist() == [[127, -2, 2], [0, 0, 0], [-127, 1, 127]]  # -1.5 and 2.5 to even; beyond the ends
    assert per_token.shape == (3, 1) and (per_token == scale).all()
    assert torch.allclose(round_input(x, STATIC, scale)[2], torch.tensor([-2.54, 0.02, 2.54]))


def test_a_static_scale_of_nothing_is_one():
    assert STATIC.static_scale(torch.zeros(5)).tolist() == [1.0]


def test_the_full_range_by_hand():
    full = InputScheme(full_range=True)
    x = torch.tensor([[-255.0, 254.0, 1.0, 3.0], [255.0, 0.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = quantize_input(x, full)
    assert scale.tolist() == [[2.0], [2.0], [1.0]]  # 255 / 127.5
    assert codes.tolist() == [[-128, 127, 0, 2], [127, 0, 1, -1], [0, 0, 0, 0]]  # -127.5, 0.5 and 1.5 to even
    saturated, _ = quantize_input(x, InputScheme(static=True, full_range=True), torch.tensor([1.0]))
    assert saturated.tolist() == [[-128, 127, 1, 3], [127, 0, 2, -2], [0, 0, 0, 0]]
    assert full.to_dict() == {"bits": 8, "full_range": True} and full.label == "a8 full range"
    with pytest.raises(RecipeError, match="about integers"):
        InputScheme(grid="fp8_e4m3", full_range=True)


def test_a_static_scheme_needs_its_scale():
    with pytest.raises(ValueError, match="needs its scale"):
        quantize_input(torch.ones(1, 2), STATIC)


def test_fp8_by_hand():
    x = torch.tensor([[448.0, 17.0, -18.0, 0.3, 2**-10, 0.0]])  # E4M3 keeps 3 bits behind the first; ties to even
    codes, scale = quantize_input(x, FP8)
    assert codes.dtype == torch.float8_e4m3fn and scale.tolist() == [[1.0]]
    assert codes.float().tolist() == [[448.0, 16.0, -18.0, 0.3125, 0.0, 0.0]]
    halved, scale = quantize_input(x / 2, FP8)
    assert scale.tolist() == [[0.5]] and torch.equal(halved.float(), codes.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fp8_errs_by_a_sixteenth(dtype):
    x = torch.randn(7, 43, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_input(x, FP8)
    assert rounded.dtype == dtype
    step = x.double().abs().amax(-1, keepdim=True) / 448 * 2**-9  # the smallest, of numbers near zero
    assert ((rounded.double() - x.double()).abs() <= x.double().abs() * (2**-4 + 2**-8) + step).all()


def test_fp8_saturates_at_a_static_scale():
    scheme = InputScheme(grid="fp8_e4m3", static=True)
    rounded = round_input(torch.tensor([[1e6, -1e6, float("inf"), 1.0]]), scheme, torch.tensor([1.0]))
    assert rounded.tolist() == [[448.0, -448.0, 448.0, 1.0]]


@pytest.mark.parametrize("scheme", [InputScheme(8), FP8, STATIC, InputScheme(grid="fp8_e4m3", static=True)], ids=str)
def test_a_token_that_is_no_number_stays_so_and_the_others_do_not_mind(scheme):
    scale = torch.tensor([0.5]) if scheme.static else None
    x = torch.tensor([[1.0, NAN, 2.0], [1.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    codes, per_token = quantize_input(x, scheme, scale)
    product = codes.float().sum(-1) * per_token[:, 0]  # what a kernel makes of it
    assert product[0].isnan() and product[1].isfinite() and product[2] == 0
    rounded = round_input(x, scheme, scale)
    assert rounded[0].isnan().any() and torch.equal(rounded[1:], round_input(x[1:], scheme, scale))


def test_impossible_schemes():
    with pytest.raises(RecipeError, match="input bits=7: fp8_e4m3 has 8"):
        InputScheme(7, "fp8_e4m3")
    with pytest.raises(RecipeError, match="grid='fp4' is neither"):
        InputScheme(8, "fp4")


def test_specs_and_labels():
    schemes = {
        "a8": ({"bits": 8}, InputScheme(8)),
        "a6 static": ({"bits": 6, "static": True}, InputScheme(6, static=True)),
        "a8 fp8": ({"bits": 8, "grid": "fp8_e4m3"}, FP8),
    }
    for label, (spec, scheme) in schemes.items():
        assert (scheme.label, scheme.to_dict(), InputScheme(**spec)) == (label, spec, scheme)
