import numpy as np
import pytest
import torch

from trifold.core.errors import RecipeError
from trifold.core.method import LayerProblem
from trifold.core.ranges import expand_groups, fit_ranges, from_bounds, to_codes
from trifold.core.scheme import Scheme
from trifold.quantizers import HQQ, RTN
from trifold.quantizers.hqq import shrink

KINDS = [Scheme(bits, 16, zero_point="real") for bits in (1, 2, 3, 4, 8)]
KINDS += [Scheme(3, 16), Scheme(4, 16, True), Scheme(4, 16, grid="nf4"), Scheme(8, 16, grid="fp8_e4m3")]
KINDS += [Scheme(4, group, zero_point="real") for group in (1, 7, "channel", "tensor")]


def weight(rows=9, columns=43, seed=0, spread=0.02):
    """Normal weights with a few far out, in the size that weights of models have."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    return spread * torch.where(torch.rand(w.shape, generator=generator) < 0.02, 4 * w, w)


def solve(w, scheme, method):
    return method.solve(LayerProblem({"a": w}, {"a": scheme})).canonical["a"]


def by_group(x, scheme):
    """(rows, groups) sums, or one sum for the tensor."""
    if scheme.group_size == "tensor":
        return x.sum().reshape(1, 1)
    return torch.stack([part.sum(1) for part in x.split(scheme.group_width(x.shape[1]), dim=1)], dim=1)


def objective(w, canonical, norm=0.7):
    return by_group((canonical.dequantize() - w).abs().pow(norm), canonical.scheme)


def test_shrinkage_by_hand():
    x = torch.tensor([-0.5, -0.05, 0.02, 0.3, 0.0])
    assert shrink(x, 10.0, 0.7).tolist() == pytest.approx([-0.376886, 0, 0, 0.156496, 0], abs=1e-6)
    assert shrink(x, 10.0, 1.0).tolist() == pytest.approx([-0.4, 0, 0, 0.2, 0], abs=1e-6)  # soft threshold 1 / beta
    assert shrink(x, 1e12, 0.7).tolist() == pytest.approx(x.tolist(), abs=1e-9)


@pytest.mark.parametrize(
    "bits, laplace, first, best",
    [
        (4, False, 0.07527, 0.07262),
        (3, False, 0.16127, 0.15295),
        (2, False, 0.37928, 0.36483),
        (2, True, 0.66872, 0.61689),
    ],
)
def test_the_papers_mean_error_on_random_weights(bits, laplace, first, best):
    """64 x 512 numbers in 512 groups of 64, mean |error| of min-max rounding and of the paper's zero-points; the
    figures are another implementation's, on another draw."""
    w = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    if laplace:
        u = torch.rand(512, 64, generator=torch.Generator().manual_seed(0)) - 0.5
        w = -u.sign() * (1 - 2 * u.abs()).log()
    scheme = Scheme(bits, 64, scale_dtype="float32", zero_point="real")
    rounded, found = (solve(w, scheme, method).dequantize() for method in (RTN("minmax"), HQQ("paper")))
    assert float((rounded - w).abs().mean()) == pytest.approx(first, rel=0.02)
    assert float((found - w).abs().mean()) == pytest.approx(best, rel=0.02)


def test_one_step_of_the_paper_by_hand():
    """codes 0 1 3, errors 0 0.25 0; with a large beta nothing is shrunk away, so that E is the error itself."""
    w = torch.tensor([[0.0, 1.25, 3.0]])
    scheme = Scheme(2, "channel", scale_dtype="float32", zero_point="real")
    for beta, zero in ((1e9, 0.0), (1e-9, -0.25 / 3)):  # E = error, then W - E = W'; E = 0, then the mean error
        found = solve(w, scheme, HQQ("paper", beta=beta, steps=1))
        assert found.zero_point.item() == pytest.approx(zero, abs=1e-6) and found.scale.item() == 1
        assert found.codes.tolist() == [[0, 1, 3]]


def test_joint_step_is_the_line_through_codes_and_weights():
    w = torch.tensor([[0.0, 1.2, 2.2, 1.2, 2.2, 1.2, 3.0]])
    scheme = Scheme(2, "channel", scale_dtype="float32", zero_point="real")
    scale, zero = HQQ(beta=1e-9, steps=1, norm=1.0).ranges(w, scheme)  # so small a beta shrinks all errors away
    slope, intercept = np.polyfit([0, 1, 2, 1, 2, 1, 3], w[0].numpy(), 1)
    assert scale.item() == pytest.approx(slope, rel=1e-5) and -zero.item() * slope == pytest.approx(intercept, rel=1e-5)
    assert HQQ(steps=0).ranges(w, scheme)[0].item() == 1


@pytest.mark.parametrize("scheme", KINDS, ids=str)
def test_no_group_is_worse_than_min_max_rounding(scheme):
    w = weight()
    baseline = objective(w, solve(w, scheme, RTN("minmax")))
    assert (objective(w, solve(w, scheme, HQQ())) <= baseline * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", [0.3, 0.7, 1.0])
def test_more_steps_never_raise_the_objective_of_any_group(norm):
    w, scheme = weight(64, 96), Scheme(3, 32, zero_point="real")
    last = None
    for steps in (0, 1, 2, 3, 5, 10, 20, 40):
        found = objective(w, solve(w, scheme, HQQ(norm=norm, steps=steps)), norm)
        assert last is None or (found <= last * (1 + 1e-5)).all()
        last = found
    first = objective(w, solve(w, scheme, RTN("minmax")), norm)
    assert last.sum() < 0.97 * first.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_order_of_the_methods(bits):
    """In its norm, the joint fit beats the paper's, which beats min-max rounding; both beat that in squares."""
    scheme, error, square = Scheme(bits, 64, zero_point="real"), {}, {}
    w = weight(256, 256, spread=1.0)
    methods = {"joint": HQQ(), "paper": HQQ("paper"), "minmax": RTN("minmax")}
    for name, method in methods.items():
        found = solve(w, scheme, method)
        error[name] = float(objective(w, found).sum())
        square[name] = float((found.dequantize() - w).square().sum())
    assert error["joint"] < 0.998 * error["paper"] and error["paper"] < 0.99 * error["minmax"]
    assert max(square["joint"], square["paper"]) < 0.97 * square["minmax"]


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_size_of_the_weights_does_not_matter(factor):
    w, scheme = weight(), Scheme(3, 16, scale_dtype="float32", zero_point="real")
    one, two = solve(w, scheme, HQQ()), solve(w * factor, scheme, HQQ())
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale * factor, two.scale)
    assert torch.equal(one.zero_point, two.zero_point)


@pytest.mark.parametrize("variant", ["joint", "paper"])
@pytest.mark.parametrize("scheme", KINDS, ids=str)
def test_adversarial_weights(variant, scheme):
    zeros = torch.zeros(3, 43)
    assert not solve(zeros, scheme, HQQ(variant)).dequantize().any() or scheme.bits == 1
    spiky = weight()
    spiky[1], spiky[2, :16], spiky[4, 5], spiky[6] = 0, 0, 3e38, 1e-45
    spiky[7], spiky[8] = 100 + spiky[7], -0.5
    for w in (spiky, spiky[:1], spiky[:, :1], spiky[:, :2]):
        found = solve(w, scheme, HQQ(variant))
        assert found.shape == w.shape and torch.isfinite(found.scale.float()).all() and (found.scale > 0).all()
        assert found.zero_point is None or torch.isfinite(found.zero_point.float()).all()
        assert not torch.isnan(found.dequantize()).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(value):
    w = weight()
    w[3, 5] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve(w, Scheme(4, 16), HQQ())


def test_groups_are_independent_also_a_shorter_last_one():
    w, scheme = weight(), Scheme(3, 16, zero_point="real")
    whole = HQQ().ranges(w, scheme)
    for number, part in enumerate(w.split(16, dim=1)):
        alone = HQQ().ranges(part.contiguous(), Scheme(3, "channel", zero_point="real"))
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[:, number : number + 1], b, rtol=1e-2, atol=1e-2)


def test_slabs_do_not_change_the_result(monkeypatch):
    w, scheme = weight(), Scheme(3, 16, zero_point="real")
    whole = HQQ().ranges(w, scheme)
    monkeypatch.setattr("trifold.core.ranges._ELEMENTS_AT_ONCE", 100)
    assert all(torch.equal(a, b) for a, b in zip(whole, HQQ().ranges(w, scheme), strict=True))


def test_an_exactly_representable_weight_stays():
    scheme = Scheme(3, 8, zero_point="real")
    codes = torch.arange(8.0).repeat(4, 2)
    w = (codes - 3) * 0.25
    assert torch.equal(solve(w, scheme, HQQ()).dequantize(), w)


def test_nothing_to_fit_is_min_max_rounding():
    w = weight()
    for scheme in (Scheme(4, 16, True), Scheme(4, 16, grid="nf4")):
        paper, rounded = solve(w, scheme, HQQ("paper")), solve(w, scheme, RTN("minmax"))
        assert torch.equal(paper.codes, rounded.codes) and torch.equal(paper.scale, rounded.scale)
    steps0, rounded = solve(w, Scheme(3, 16), HQQ(steps=0)), solve(w, Scheme(3, 16), RTN("minmax"))
    assert torch.equal(steps0.codes, rounded.codes)


@pytest.mark.parametrize("settings", [{"norm": 0}, {"norm": 1.5}, {"steps": -1}, {"beta": 0}, {"growth": 0.5}])
def test_impossible_settings(settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        HQQ(**settings)


def test_the_ranges_are_those_that_round():
    w, scheme = weight(), Scheme(4, 16, zero_point="real")
    scale, zero = HQQ().ranges(w, scheme)
    s, z = (expand_groups(t, w.shape, 16) for t in (scale, zero))
    assert torch.equal((to_codes(w, s, z, scheme) - z) * s, solve(w, scheme, HQQ()).dequantize())
    low, high = w[:, :16].amin(1), w[:, :16].amax(1)
    start = from_bounds(low, high, scheme)[0]
    assert torch.equal(start, fit_ranges(w, scheme)[0][:, 0])
