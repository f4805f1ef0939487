import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trifold.core import ranges
from trifold.core.native import library
from trifold.core.ranges import expand_groups, fit_ranges, from_bounds, group_view, round_scale, to_codes
from trifold.core.scheme import SCALE_DTYPES, Scheme


def quantize(weight, scheme, **options):
    """codes, scale, zero-point and the dequantised weight."""
    rows, columns = weight.shape
    scale, zero = fit_ranges(weight, scheme, **options)
    assert scale.shape == scheme.scale_shape(rows, columns) and scale.dtype == torch.float32
    width = scheme.group_width(columns)
    s = expand_groups(scale, (rows, columns), width)
    z = scheme.midpoint if zero is None else expand_groups(zero, (rows, columns), width)
    codes = to_codes(weight, s, z, scheme)
    return codes, scale, zero, (codes - z) * s


def exact(bits, symmetric, group="channel"):
    return Scheme(bits, group, symmetric, "float32")


@pytest.mark.parametrize(
    "bits, symmetric, weight, scale, zero, codes, sse",
    [
        (4, True, [0.93, -0.33, 0.21, -1.4], 0.2, None, [13, 6, 9, 1], 0.0099),
        (4, False, [0.93, -0.33, 0.21, -1.4], 0.1553333, 9, [15, 7, 10, 0], 0.0033702),
        (3, True, [0.93, -0.33, 0.21, -1.4], 0.4666667, None, [6, 3, 4, 1], 0.0627889),
        (3, False, [0.93, -0.33, 0.21, -1.4], 0.3328571, 4, [7, 3, 5, 0], 0.0245061),
        (4, True, [0.7, -0.33, 0.1, 0.02], 0.1, None, [15, 5, 9, 8], 0.0013),
        (2, False, [3.0, 1.0, 2.0, 1.0], 1.0, 0, [3, 1, 2, 1], 0.0),  # all positive: zero is included
        (2, False, [-3.0, -1.0, -2.0, -1.0], 1.0, 3, [0, 2, 1, 2], 0.0),
        (1, True, [0.5, -0.5, 0.5, 0.5], 1.0, None, [1, 0, 1, 1], 0.0),
        (1, False, [0.0, 2.0, 2.0, 0.0], 2.0, 0, [0, 1, 1, 0], 0.0),
    ],
)
def test_by_hand(bits, symmetric, weight, scale, zero, codes, sse):
    w = torch.tensor([weight])
    got, s, z, back = quantize(w, exact(bits, symmetric))
    assert s.item() == pytest.approx(scale, rel=1e-6)
    assert z is None if zero is None else z.item() == zero
    assert got.tolist() == [codes]
    assert (back - w).square().sum().item() == pytest.approx(sse, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("norm, factor, score", [(2.0, 0.67, 0.315072), (2.4, 0.70, 0.2149476)])
def test_the_search_by_hand(norm, factor, score):
    w = torch.tensor([[1.0] * 7 + [1.6]])
    _, scale, _, back = quantize(w, exact(2, True), ranges="mse", norm=norm)
    assert scale.item() == pytest.approx(1.6 * factor, rel=1e-6)
    assert (back - w).abs().pow(norm).sum().item() == pytest.approx(score, rel=1e-5)
    _, scale, _, back = quantize(w, exact(2, True))
    assert scale.item() == pytest.approx(1.6)
    assert (back - w).square().sum().item() == pytest.approx(2.52, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([5, 16, 43, "channel", "tensor"]),
    symmetric=st.booleans(),
    norm=st.sampled_from([1.0, 2.0, 2.4]),
    dtype=st.sampled_from(sorted(SCALE_DTYPES)),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_search_never_loses_to_minmax(bits, group, symmetric, norm, dtype, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 43, generator=generator) * 10.0 ** torch.randint(-3, 3, (3, 1), generator=generator)
    importance = torch.rand(43, generator=generator) if weighted else None
    scheme = Scheme(bits, group, symmetric, dtype)
    cost = torch.ones(43) if importance is None else importance

    def score(ranges):
        back = quantize(w, scheme, ranges=ranges, importance=importance, norm=norm)[3]
        power = (back - w).abs().pow(norm) * cost
        if group == "tensor":
            return power.sum().reshape(1, 1)
        return torch.stack([part.sum(1) for part in power.split(scheme.group_width(43), dim=1)], dim=1)

    assert (score("mse") <= score("minmax") * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_groups_are_independent_also_a_shorter_last_one(symmetric, ranges):
    w = torch.randn(7, 43, generator=torch.Generator().manual_seed(0))
    scale, zero = fit_ranges(w, exact(4, symmetric, 16), ranges)
    for number, part in enumerate(w.split(16, dim=1)):
        alone, origin = fit_ranges(part.contiguous(), exact(4, symmetric), ranges)
        assert torch.equal(scale[:, number : number + 1], alone)
        assert symmetric or torch.equal(zero[:, number : number + 1], origin)


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_one_scale_for_the_tensor(ranges):
    w = torch.randn(7, 43, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(43, generator=torch.Generator().manual_seed(1))
    scale, zero = fit_ranges(w, exact(4, False, "tensor"), ranges, importance)
    alone, origin = fit_ranges(w.reshape(1, -1), exact(4, False), ranges, importance.repeat(7))
    assert torch.equal(scale, alone) and torch.equal(zero, origin)


def test_importance_decides_what_is_cut():
    w = torch.tensor([[1.0] * 7 + [1.6]])
    only_last = torch.tensor([0.0] * 7 + [1.0])
    back = quantize(w, exact(2, True), ranges="mse", importance=only_last)[3]
    assert back[0, -1].item() == pytest.approx(1.6)
    back = quantize(w, exact(2, True), ranges="mse", importance=1 - only_last)[3]
    assert back[0, 0].item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_inside_the_range_the_error_is_half_a_step(bits, symmetric):
    w = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits))
    codes, scale, zero, back = quantize(w, exact(bits, symmetric, 32))
    step = expand_groups(scale, (7, 96), 32)
    # An asymmetric zero-point is rounded, so that an extreme may be clipped by up to half a step more.
    assert ((back - w).abs() <= step * (0.5 if symmetric else 1.0) * (1 + 1e-5)).all()
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert torch.equal(codes, codes.round())
    if zero is not None:
        assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= 2**bits - 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_a_second_rounding_changes_nothing(symmetric, ranges):
    w = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    scheme = exact(4, symmetric, 32)
    codes, scale, zero, back = quantize(w, scheme, ranges=ranges)
    z = scheme.midpoint if zero is None else expand_groups(zero, (7, 96), 32)
    assert torch.equal(to_codes(back, expand_groups(scale, (7, 96), 32), z, scheme), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_zeros_stay_zeros(bits, symmetric, ranges):
    w = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).abs()
    w[1] = 0
    w[2, :16] = 0
    w[:, ::3] = 0
    back = quantize(w, exact(bits, symmetric, 16), ranges=ranges)[3]
    assert not back[w == 0].any()


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", sorted(SCALE_DTYPES))
def test_no_finite_weight_gives_nan(bits, symmetric, ranges, dtype):
    rows = [[3e38, -3e38, 0, 1], [1e-45, -1e-45, 0, 0], [1e5] * 4, [-1e-30, 0, 1e-38, 0], [0] * 4]
    w = torch.tensor([*rows, [7.0, 7, 7, 7], [-7.0, -7, -7, -7]])
    codes, scale, zero, back = quantize(w, Scheme(bits, 3, symmetric, dtype), ranges=ranges)
    for tensor in (codes, scale, *(() if zero is None else (zero,))):
        assert torch.isfinite(tensor).all()
    assert (scale > 0).all() and not torch.isnan(back).any()


@pytest.mark.parametrize("name", sorted(SCALE_DTYPES))
def test_scales_are_rounded_before_codes_are_chosen(name):
    dtype = SCALE_DTYPES[name]
    w = torch.randn(5, 43, generator=torch.Generator().manual_seed(0))
    scale, _ = fit_ranges(w, Scheme(4, 16, False, name), "mse")
    assert torch.equal(scale.to(dtype).float(), scale)
    extremes = torch.tensor([0.0, -1.0, 1e-44, 1e39, float("inf")])
    stored = round_scale(extremes, Scheme(4, 16, False, name))
    assert torch.isfinite(stored).all() and (stored > 0).all()
    assert stored[0] == 1


def test_bounds_reach_to_zero():
    low, high = torch.tensor([2.0, -4.0]), torch.tensor([6.0, -1.0])
    scale, zero = from_bounds(low, high, exact(2, False))
    assert torch.allclose(scale, torch.tensor([2.0, 4 / 3])) and zero.tolist() == [0, 3]


def test_views_of_groups():
    w = torch.arange(10.0).reshape(2, 5)
    assert group_view(w, 2).tolist() == [[[0, 1], [2, 3], [4, 4]], [[5, 6], [7, 8], [9, 9]]]
    scale = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert expand_groups(scale, (2, 5), 2).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert expand_groups(torch.ones(1, 1), (2, 5), 5).shape == (2, 5)


def test_slabs_do_not_change_the_result(monkeypatch):
    monkeypatch.setattr(ranges, "search_ranges", lambda *_: None)
    w = torch.randn(9, 43, generator=torch.Generator().manual_seed(0))
    whole = fit_ranges(w, exact(4, False, 16), "mse")
    monkeypatch.setattr("trifold.core.ranges._ELEMENTS_AT_ONCE", 100)
    parts = fit_ranges(w, exact(4, False, 16), "mse")
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_per_channel_integers_of_glm_130b_by_hand():
    """The scale is rounded to float16 before codes are chosen: 0.7 / 0.09997559 is still code 7."""
    w = torch.tensor([[0.7, -0.33, 0.1, 0.02]])
    codes, scale, zero, back = quantize(w, Scheme(4, "channel", True, "float16"))
    assert scale.item() == pytest.approx(0.09997559, abs=1e-8) and zero is None
    assert (codes - 8).tolist() == [[7, -3, 1, 0]]
    assert ((back - w).abs() <= scale / 2 * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, "channel", "tensor"])
def test_real_zero_points_reach_both_ends(bits, group):
    """Unlike integer ones they cover [low, high] exactly, up to their own rounding."""
    w = torch.randn(7, 43, generator=torch.Generator().manual_seed(bits))
    codes, scale, _, back = quantize(w, Scheme(bits, group, False, "float32", zero_point="real"))
    step = expand_groups(scale, (7, 43), 16 if group == 16 else 43)
    assert ((back - w).abs() <= step * 0.5 * (1 + 1e-4)).all()
    assert codes.min() == 0 and codes.max() == 2**bits - 1
    stored = fit_ranges(w, Scheme(bits, group, False, "bfloat16", zero_point="real"))[1]
    assert torch.equal(stored.bfloat16().float(), stored)


@pytest.mark.parametrize("dtype", sorted(SCALE_DTYPES))
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_no_finite_weight_gives_nan_with_real_zero_points(ranges, dtype):
    rows = [[3e38, -3e38, 0, 1], [1e-45, -1e-45, 0, 0], [1e5] * 4, [-1e-30, 0, 1e-38, 0], [0] * 4, [-7.0] * 4]
    codes, scale, zero, back = quantize(
        torch.tensor(rows), Scheme(4, 3, False, dtype, zero_point="real"), ranges=ranges
    )
    assert all(torch.isfinite(tensor).all() for tensor in (codes, scale, zero))
    assert not torch.isnan(back).any() and not back[4].any()


# -- the compiled search -------------------------------------------------------------------------------------


def both_searches(weight, scheme, monkeypatch, **options):
    """Ranges as the compiled search finds them and as torch does."""
    found = fit_ranges(weight, scheme, "mse", **options)
    with monkeypatch.context() as patch:
        patch.setattr(ranges, "search_ranges", lambda *_: None)
        return found, fit_ranges(weight, scheme, "mse", **options)


@pytest.mark.skipif(library("ranges") is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("norm", [2, 2.4, 4, 1.0])
@pytest.mark.parametrize("bits, symmetric, group", [(4, False, 32), (3, True, 48), (2, False, "channel"), (1, True, 7)])
def test_the_compiled_search_finds_what_torch_does(bits, symmetric, group, norm, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(37, 131, generator=generator) * torch.rand(37, 1, generator=generator)
    weight[3] = 0
    weight[5, :60] = 0
    weight[7] = weight[7].abs()
    scheme, importance = Scheme(bits, group, symmetric, dtype), torch.rand(131, generator=generator)
    (scale, zero), (wanted, wanted_zero) = both_searches(weight, scheme, monkeypatch, norm=norm, importance=importance)
    same = scale == wanted
    assert same.float().mean() > 0.99  # two ranges may be equally good
    assert (zero is None) == (wanted_zero is None) and (zero is None or (zero == wanted_zero)[same].all())
    width = scheme.group_width(131)

    def loss(scale, zero):
        s = expand_groups(scale, weight.shape, width)
        z = scheme.midpoint if zero is None else expand_groups(zero, weight.shape, width)
        error = ((to_codes(weight, s, z, scheme) - z) * s - weight).abs().double().pow(norm) * importance
        return group_view(torch.nn.functional.pad(error, (0, -131 % width)), width).sum(-1)

    assert torch.allclose(loss(scale, zero), loss(wanted, wanted_zero), rtol=1e-5, atol=1e-30)


@pytest.mark.skipif(library("ranges") is None, reason="no C compiler")
def test_the_compiled_search_does_not_depend_on_threads():
    weight = torch.randn(1031, 600, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fit_ranges(weight, Scheme(4, 64), "mse"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
