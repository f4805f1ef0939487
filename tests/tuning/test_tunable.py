import pytest
import torch

from tests.sparse_samples import KINDS, sparse_weight
from trifold.core.canonical import Chain, Dense, LowRank, RoundedInput, Split, Sum
from trifold.core.inputs import InputScheme
from trifold.core.scheme import Scheme
from trifold.formats import describe
from trifold.tuning.tunable import SCALES, WEIGHTS, ZEROS, straight_through, tunable

ALL = frozenset({WEIGHTS, SCALES, ZEROS})


def samples():
    found = {kind: sparse_weight((8, 64), pattern, values) for kind, (pattern, values, _) in KINDS.items()}
    inside = {f"dense {kind}": weight.values for kind, weight in found.items()}
    half = {kind: sparse_weight((8, 32), "1x16", Scheme(4, 16)) for kind in ("a", "b")}
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 2, (64,), generator=generator)
    index[:32], index[32:] = index[:32] * 0, 1
    index = index[torch.randperm(64, generator=generator)]
    low = LowRank(torch.randn(8, 3, generator=generator).bfloat16(), torch.randn(3, 64, generator=generator).bfloat16())
    whole = found["group int4"]
    square = Dense(torch.randn(8, 8, generator=generator))
    nested = {
        "low rank": low,
        "sum": Sum((whole, low)),
        "split": Split(1, index, tuple(half.values())),
        "chain": Chain((square, whole)),
    }
    return found | inside | nested


SAMPLES = samples()


@pytest.mark.parametrize("kind", SAMPLES)
def test_it_begins_as_what_was_decided_bit_for_bit(kind):
    decided = SAMPLES[kind]
    made = tunable(decided, ALL)
    assert torch.equal(made.weight(), decided.dequantize())
    assert torch.equal(made.canonical().dequantize(), decided.dequantize())
    assert describe(made.canonical()) == describe(decided)
    assert list(tunable(decided, frozenset()).parameters()) == []


@pytest.mark.parametrize("kind", SAMPLES)
def test_wherever_it_goes_the_forward_pass_is_what_is_stored(kind):
    decided = SAMPLES[kind]
    made = tunable(decided, ALL)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(6 * torch.rand(parameter.shape, generator=generator) - 3)
    canonical = made.canonical()
    assert torch.equal(made.weight(), canonical.dequantize()) and torch.isfinite(made.weight()).all()
    assert not torch.equal(canonical.dequantize(), decided.dequantize())
    assert describe(canonical) == describe(decided)
    if hasattr(decided, "mask"):
        assert torch.equal(canonical.mask, decided.mask) and (made.weight()[~decided.mask] == 0).all()


def test_scales_alone_leave_the_codes():
    decided = SAMPLES["group int4"]
    made = tunable(decided, frozenset({SCALES}))
    (parameter,) = made.parameters()
    with torch.no_grad():
        parameter.fill_(0.25)
    found = made.canonical()
    assert torch.equal(found.values.codes, decided.values.codes)
    assert torch.equal(found.values.zero_point, decided.values.zero_point)
    kept = decided.mask[:, ::16]
    assert torch.equal(found.values.scale[kept], (decided.values.scale[kept].float() * 1.25).bfloat16())


def test_gradients_pass_through_rounding_and_stop_at_the_mask():
    decided = SAMPLES["group int4"]
    made = tunable(decided, ALL)
    slope = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    (made.weight() * slope).sum().backward()
    weights, scales, zeros = (next(made.of_kind(kind)).grad for kind in (WEIGHTS, SCALES, ZEROS))
    values = decided.values
    scale, zero = (t.float().repeat_interleave(16, 1) for t in (values.scale, values.zero_point))
    inside = slope * decided.mask
    torch.testing.assert_close(weights, inside * scale)
    grouped = (inside * (values.codes.float() - zero) * scale).unflatten(1, (-1, 16)).sum(-1)
    torch.testing.assert_close(scales, grouped)
    torch.testing.assert_close(zeros, -(inside * scale).unflatten(1, (-1, 16)).sum(-1))


def test_straight_through_is_exact():
    value = torch.tensor([0.1, 1e9, -3.3], requires_grad=True)
    rounded = straight_through(value, value.round())
    assert torch.equal(rounded, value.round())
    rounded.sum().backward()
    assert torch.equal(value.grad, torch.ones(3))


def test_what_cannot_be_tuned():
    with pytest.raises(TypeError, match="a RoundedInput cannot be tuned"):
        tunable(RoundedInput(SAMPLES["dense group int4"], InputScheme(8)), ALL)
