import pytest
import torch

from trifold.core.method import BlockContext, LayerProblem, Statistics
from trifold.core.obs import relative_error
from trifold.core.scheme import Scheme
from trifold.core.statistics import AbsMean, Gram, Observation
from trifold.core.topology import Fold, Topology
from trifold.quantizers import AWQ, RTN
from trifold.quantizers.awq import clip_search

SCHEME = Scheme(3, 128)


def outliers(columns=128, tokens=512, every=17, factor=20.0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    x[:, ::every] *= factor
    return x


def context(fold, weights, parameters, x, topology_head=0, scheme=SCHEME):
    statistics = Statistics((Gram, AbsMean), x.shape[1])
    for statistic in statistics:
        statistic.update(Observation(x))
    leader = fold.consumers[0]
    return BlockContext(
        topology=Topology((fold,), topology_head),
        weights=weights,
        parameters=parameters,
        inputs={name: leader if name in fold.consumers else name for name in weights},
        statistics={leader: statistics},
        schemes=dict.fromkeys(weights, scheme),
        replay=lambda name, replaced: x @ replaced[leader].T,
    )


def one_norm(x, rows=64, **more):
    weight = torch.randn(rows, x.shape[1], generator=torch.Generator().manual_seed(1))
    fold = Fold("norm", "norm", ("a",), "a")
    return context(fold, {"a": weight}, {"norm.weight": torch.ones(x.shape[1])}, x, **more)


def error(change, ctx, x):
    """Relative output error of rounding after the rewrite, in terms of the original weight."""
    scale = change.divided.get("a", torch.ones(x.shape[1]))
    weight = change.weights.get("a", ctx.weights["a"])
    bounds = {"a": change.bounds["a"]} if "a" in change.bounds else {}
    rounded = RTN("minmax").solve(LayerProblem({"a": weight}, {"a": SCHEME}, None, None, bounds)).canonical["a"]
    return relative_error(ctx.weights["a"], rounded.dequantize() / scale, (x.T @ x).double())


def test_scaling_helps_where_channels_stand_out():
    x = outliers()
    ctx = one_norm(x)
    plain = relative_error(
        ctx.weights["a"],
        RTN("minmax").solve(LayerProblem(ctx.weights, ctx.schemes)).canonical["a"].dequantize(),
        (x.T @ x).double(),
    )
    for objective in ("gram", "module"):
        for scaling in ("plain", "duo", "both"):
            change, _ = AWQ(scaling=scaling, clip=False, objective=objective).rewrite(ctx, None)
            assert error(change, ctx, x) < 0.7 * plain
    both = error(AWQ().rewrite(ctx, None)[0], ctx, x)
    assert both <= error(AWQ(clip=False).rewrite(ctx, None)[0], ctx, x)


def test_the_two_objectives_agree_on_one_linear():
    x = outliers()
    a, b = (AWQ(clip=False, objective=o).rewrite(one_norm(x), None)[0] for o in ("gram", "module"))
    assert a.events["a"]["awq"]["scaling"] == b.events["a"]["awq"]["scaling"]
    assert abs(a.events["a"]["awq"]["loss_ratio"] - b.events["a"]["awq"]["loss_ratio"]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_into_a_norm_keeps_the_function_exactly(dtype):
    x = outliers()
    ctx = one_norm(x)
    norm = (torch.rand(x.shape[1]) + 0.5).to(dtype)
    norm[3] = 0
    ctx = context(ctx.topology.folds[0], ctx.weights, {"norm.weight": norm}, x)
    change, _ = AWQ(clip=False).rewrite(ctx, None)
    assert change.parameters["norm.weight"].dtype == dtype
    before = ctx.weights["a"] * norm.float()
    after = change.weights["a"] * change.parameters["norm.weight"].float()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_equal_channels_are_left_alone():
    x = torch.randn(64, 128).sign()
    change, _ = AWQ(scaling="plain", clip=False).rewrite(one_norm(x), None)
    assert not change.weights and change.events["a"]["awq"]["scaling"] == "none"


def test_grouped_query_heads_share_the_scale_of_their_value_head():
    head, kv, queries = 4, 2, 6
    x = outliers(head * queries, every=5)
    fold = Fold("value", "v", ("o",), "o")
    generator = torch.Generator().manual_seed(2)
    weights = {"o": torch.randn(16, head * queries, generator=generator), "v": torch.randn(head * kv, 16)}
    ctx = context(fold, weights, {"v.bias": torch.ones(head * kv)}, x, topology_head=head, scheme=Scheme(3, 12))
    change, _ = AWQ(clip=False).rewrite(ctx, None)
    scale = change.divided["o"].reshape(kv, queries // kv, head)
    assert torch.equal(scale, scale[:, :1].expand_as(scale)) and scale.std() > 0
    rows = scale[:, 0].reshape(-1)
    torch.testing.assert_close(change.weights["v"] * rows[:, None], weights["v"])
    torch.testing.assert_close(change.parameters["v.bias"], 1 / rows)


def test_a_fold_whose_linears_are_not_all_compressed_is_skipped():
    x = outliers()
    fold = Fold("norm", "norm", ("a", "b"), "a")
    weight = torch.randn(8, 128)
    change, _ = AWQ(clip=False).rewrite(context(fold, {"a": weight}, {"norm.weight": torch.ones(128)}, x), None)
    assert not change.weights and not change.parameters


@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(3, 50), Scheme(2, "channel", True), Scheme(4, "tensor")])
def test_clip_search_is_never_worse_than_no_clipping(scheme):
    x = outliers()
    gram = (x.T @ x).float()
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    plain = RTN("minmax").solve(LayerProblem({"a": weight}, {"a": scheme})).canonical["a"]
    clipped = (
        RTN()
        .solve(LayerProblem({"a": weight}, {"a": scheme}, None, None, {"a": clip_search(weight, scheme, gram)}))
        .canonical["a"]
    )
    width = scheme.group_width(128)
    for start in range(0, 128, width):
        part = slice(start, start + width)
        block = gram[part, part].double()
        costs = [
            (((c.dequantize() - weight)[:, part].double() @ block) * (c.dequantize() - weight)[:, part]).sum(1)
            for c in (clipped, plain)
        ]
        assert (costs[0] <= costs[1] * (1 + 1e-4) + 1e-9).all()
