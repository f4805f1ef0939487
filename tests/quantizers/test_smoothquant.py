import pytest
import torch

from trifold.core.errors import RecipeError
from trifold.core.inputs import InputScheme, round_input
from trifold.core.method import BlockContext, LayerProblem, Statistics
from trifold.core.scheme import Scheme
from trifold.core.statistics import AbsMax, Gram, Observation, Sample
from trifold.core.topology import Fold, Topology
from trifold.quantizers import RTN, SmoothQuant
from trifold.quantizers.smoothquant import smoothing

CHANNEL = Scheme(8, "channel", True, "float32")
INT8, STATIC = InputScheme(8), InputScheme(8, static=True)
NORM = Fold("norm", "norm", ("a", "b"), "a")


def outliers(tokens=400, columns=48, every=17, factor=40.0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    x[:, ::every] *= factor
    return x


def context(x, folds=(NORM,), parameters=None, roundings=INT8, dtype=torch.float32, head_dim=0):
    generator = torch.Generator().manual_seed(1)
    consumers = [name for fold in folds for name in fold.consumers]
    weights = {name: torch.randn(7, x.shape[1], generator=generator, dtype=dtype) for name in consumers}
    statistics = {}
    for fold in folds:
        statistics[fold.consumers[0]] = Statistics((Gram, AbsMax, Sample), x.shape[1])
        for statistic in statistics[fold.consumers[0]]:
            statistic.update(Observation(x))
    norm = torch.rand(x.shape[1], generator=generator, dtype=dtype) + 0.5
    return BlockContext(
        topology=Topology(tuple(folds), head_dim),
        weights=weights,
        parameters={"norm.weight": norm, "norm.bias": norm - 1} if parameters is None else parameters,
        inputs={name: fold.consumers[0] for fold in folds for name in fold.consumers},
        statistics=statistics,
        schemes=dict.fromkeys(weights, CHANNEL),
        replay=lambda name, replaced: pytest.fail("runs nothing"),
        roundings=dict.fromkeys(weights, roundings) if roundings else {},
    )


def error(ctx, change, x):
    """Squared output error of rounding weights and activations after the rewrite."""
    total = 0.0
    for name, weight in ctx.weights.items():
        changed = change.weights.get(name, weight)
        rounded = RTN("minmax").solve(LayerProblem({"a": changed}, {"a": CHANNEL})).canonical["a"].dequantize()
        moved = x / change.divided.get(name, torch.ones(x.shape[1]))
        scheme = ctx.roundings[name]
        scale = scheme.static_scale(moved.abs().amax(0)) if scheme.static else None
        total += float((round_input(moved, scheme, scale) @ rounded.T - x @ weight.T).square().sum())
    return total


def test_scales_by_hand():
    absmax, weight_max = torch.tensor([16.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 4.0])
    scale = smoothing(absmax, weight_max, 0.5)
    assert scale.tolist() == [4.0, 2.0, 0.5]
    assert torch.equal(absmax / scale, weight_max * scale) and (absmax / scale).tolist() == [4.0, 2.0, 2.0]
    expected = torch.tensor([10.556, 3.249, 0.8123])
    torch.testing.assert_close(smoothing(absmax, weight_max, 0.85), expected, rtol=0, atol=5e-4)
    assert torch.equal(smoothing(absmax, weight_max, 1.0), absmax)
    assert torch.equal(smoothing(absmax, weight_max, 0.0), 1 / weight_max)


def test_channels_that_are_never_used_are_left_alone():
    scale = smoothing(torch.tensor([0.0, 4.0, 1e-30]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert scale[0] == 1 and scale[1] == pytest.approx(2 / 1e-5**0.5) and scale[2] == pytest.approx(1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.85, "search"])
def test_the_fold_keeps_the_function_and_only_as_a_whole(alpha):
    x = outliers().double()
    ctx = context(x, dtype=torch.float64)
    change, _ = SmoothQuant(alpha).rewrite(ctx, None)
    hidden = x / x.square().mean(-1, keepdim=True).sqrt()

    def function(parameters, weights):
        y = hidden * parameters["norm.weight"] + parameters["norm.bias"]
        return torch.cat([y @ weights[name].T for name in ("a", "b")], dim=1)

    before = function(ctx.parameters, ctx.weights)
    assert set(change.parameters) == {"norm.weight", "norm.bias"} and set(change.weights) == {"a", "b"}
    assert (function(change.parameters, change.weights) - before).norm() < 1e-14 * before.norm()
    assert (function(change.parameters, ctx.weights) - before).norm() > 0.1 * before.norm()
    assert (function(ctx.parameters, change.weights) - before).norm() > 0.1 * before.norm()
    for name in ("norm.weight", "norm.bias"):
        halved = {**change.parameters, name: ctx.parameters[name]}
        assert (function(halved, change.weights) - before).norm() > 0.1 * before.norm()


def test_a_norm_in_bf16_keeps_it_too():
    norm = torch.rand(48, generator=torch.Generator().manual_seed(3)).bfloat16()
    norm[5] = 0
    ctx = context(outliers(), parameters={"norm.weight": norm})
    change, _ = SmoothQuant(0.5).rewrite(ctx, None)
    assert change.parameters["norm.weight"].dtype == torch.bfloat16
    for name, weight in ctx.weights.items():
        after = change.weights[name] * change.parameters["norm.weight"].float()
        torch.testing.assert_close(after, weight * norm.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rounding", [INT8, STATIC, InputScheme(grid="fp8_e4m3", static=True), InputScheme(4)], ids=str)
def test_the_search_is_no_worse_than_any_fixed_alpha(rounding):
    x = outliers()
    ctx = context(x, roundings=rounding)
    searched, _ = SmoothQuant().rewrite(ctx, None)
    least = error(ctx, searched, x)
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert least <= error(ctx, SmoothQuant(alpha).rewrite(ctx, None)[0], x) * (1 + 1e-5)
    plain = error(ctx, type(searched)(), x)
    assert least <= plain * (1 + 1e-5)
    found = searched.events["a"]["smoothquant"]
    assert found["loss_ratio"] == pytest.approx(least / plain, rel=1e-3)
    if rounding == INT8:
        assert least < 0.1 * plain and 0 < found["alpha"] < 1


def test_equal_channels_are_left_alone():
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).sign()
    ctx = context(x, roundings=None)
    ctx.weights["a"].copy_(ctx.weights["a"].sign())
    ctx.weights["b"].copy_(ctx.weights["b"].sign())
    change, _ = SmoothQuant().rewrite(ctx, None)
    assert not change.weights and not change.parameters and change.events["a"]["smoothquant"]["alpha"] is None


def test_the_papers_folds_are_those_of_norms():
    folds = (NORM, Fold("linear", "b", ("c",), "c"))
    x = outliers(columns=7, every=3)
    ctx = context(x, folds)
    every, _ = SmoothQuant().rewrite(ctx, None)
    paper, _ = SmoothQuant(0.5, folds="norm").rewrite(ctx, None)
    assert set(every.divided) == {"a", "b", "c"} and set(paper.divided) == {"a", "b"}
    assert "c" not in paper.events and not torch.equal(every.weights["b"], paper.weights["b"])
    # both sides of the second fold, on top of the first
    rows = every.divided["c"]
    torch.testing.assert_close(every.weights["b"] * rows[:, None], ctx.weights["b"] * every.divided["b"])
    torch.testing.assert_close(every.weights["c"], ctx.weights["c"] * rows)


def test_grouped_values_share_a_scale():
    fold = Fold("value", "v", ("o",), "o")
    x = outliers(columns=24, every=5)
    ctx = context(x, (fold,), {"v.weight": torch.randn(8, 3), "v.bias": torch.ones(8)}, head_dim=4)
    change, _ = SmoothQuant(0.5).rewrite(ctx, None)
    scale = change.divided["o"].reshape(2, 3, 4)
    assert torch.equal(scale, scale[:, :1].expand_as(scale)) and scale.std() > 0
    torch.testing.assert_close(change.parameters["v.bias"], 1 / scale[:, 0].reshape(-1))


def test_a_fold_whose_linears_are_not_all_compressed_is_skipped():
    ctx = context(outliers())
    del ctx.weights["b"]
    change, _ = SmoothQuant(0.5).rewrite(ctx, None)
    assert not change.weights and not change.events


@pytest.mark.parametrize("settings", [{"alpha": 1.5}, {"alpha": -0.1}, {"grid": 0}])
def test_impossible_settings(settings):
    with pytest.raises(RecipeError):
        SmoothQuant(**settings)
