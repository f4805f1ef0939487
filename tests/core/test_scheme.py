import pytest
import torch

from trifold.core.errors import RecipeError
from trifold.core.inputs import InputScheme, quantize_input, round_input
from trifold.core.scheme import Scheme


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_and_midpoint(bits):
    scheme = Scheme(bits)
    assert scheme.max_code == 2**bits - 1
    assert scheme.midpoint == (0.5 if bits == 1 else 2 ** (bits - 1))


@pytest.mark.parametrize(
    "group, shape, width, scales",
    [
        (128, (7, 256), 128, (7, 2)),
        (128, (7, 172), 128, (7, 2)),
        (128, (7, 43), 43, (7, 1)),
        (1, (7, 43), 1, (7, 43)),
        ("channel", (7, 43), 43, (7, 1)),
        ("tensor", (7, 43), 43, (1, 1)),
    ],
)
def test_groups(group, shape, width, scales):
    scheme = Scheme(4, group)
    assert scheme.group_width(shape[1]) == width
    assert scheme.scale_shape(*shape) == scales


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 0}, "bits=0 is outside 1..8"),
        ({"bits": 16}, "bits=16 is outside 1..8"),
        ({"group_size": 0}, "group_size=0 is below 1"),
        ({"group_size": "row"}, "group_size='row' is neither"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is not one of"),
    ],
)
def test_impossible_values(settings, message):
    with pytest.raises(RecipeError, match=message):
        Scheme(**settings)
    for bits in (1, 9):
        with pytest.raises(RecipeError, match=f"input bits={bits} is outside"):
            InputScheme(bits)


def test_tokens_by_hand():
    x = torch.tensor([[1.27, -0.5, 0.004, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.27, 0.0, 0.03]])
    codes, scale = quantize_input(x, InputScheme(8))
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert codes.tolist() == [[127, -50, 0, 0], [0, 0, 0, 0], [-127, 64, 0, 2]]  # 63.5 goes to even
    assert torch.allclose(scale, torch.tensor([[0.01], [1.0], [0.02]]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_keep_their_extremes_and_err_by_half_a_step(bits, dtype):
    x = torch.randn(5, 3, 43, generator=torch.Generator().manual_seed(bits)).to(dtype)
    scheme = InputScheme(bits)
    codes, scale = quantize_input(x, scheme)
    assert codes.shape == x.shape and scale.shape == (5, 3, 1)
    assert (codes.abs().amax(-1) == scheme.largest).all()
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-4)).all()
    rounded = round_input(x, scheme)
    assert rounded.dtype == dtype and rounded.shape == x.shape
    assert torch.equal(rounded, (codes.float() * scale).to(dtype))


def test_tokens_do_not_influence_each_other():
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x[3] *= 1000
    together = round_input(x, InputScheme(8))
    assert torch.equal(together, torch.cat([round_input(row[None], InputScheme(8)) for row in x]))


def test_a_token_that_is_not_a_number_stays_so():
    x = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, -1.0]])
    rounded = round_input(x, InputScheme(8))
    assert not torch.isfinite(rounded[:2]).any()
    assert rounded[2].tolist() == [1.0, -1.0]
