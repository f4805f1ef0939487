import pytest
import torch

from tests.sparse_samples import sparse_weight
from trifold.core.method import TuningProblem
from trifold.core.scheme import Scheme
from trifold.tuning import BQPO, E2EOQP, Distill, distill
from trifold.tuning.descent import Rates, descend


def problem(seed=0, judge=(4, 5), **more):
    """Outputs of a dense weight are to be matched by a sparse int4 one with noise on top."""
    generator = torch.Generator().manual_seed(seed)
    decided = {"a": sparse_weight((16, 64), "1x16", Scheme(4, 16))}
    target = decided["a"].dequantize() + 0.02 * torch.randn(16, 64, generator=generator)
    x = [torch.randn(128, 64, generator=generator) for _ in range(6)]

    def loss(batch, weights):
        return (x[batch] @ (weights["a"]() - target).T).square().mean() / (x[batch] @ target.T).square().mean()

    return TuningProblem(decided, loss, range(4), judge, **more)


def judged(p, canonical):
    return sum(float(p.loss(b, {"a": canonical["a"].dequantize})) for b in p.judge) / len(p.judge)


def test_it_recovers_and_reports_what_it_did():
    p, notes = problem(), []
    p = TuningProblem(p.canonical, p.loss, p.learn, p.judge, note=notes.append)
    found = descend(p, Rates(0.1, 0.01, 0.05), 5, "bqpo")
    assert found.event["before"] == pytest.approx(judged(p, p.canonical))
    assert found.event["after"] == pytest.approx(judged(p, found.canonical), rel=1e-5)
    assert found.event["after"] < 0.9 * found.event["before"] and len(notes) == 5 and "epoch 5/5" in notes[-1]
    assert not torch.equal(found.canonical["a"].values.codes, p.canonical["a"].values.codes)
    assert torch.equal(found.canonical["a"].mask, p.canonical["a"].mask)


def test_it_is_never_worse():
    p = problem()
    found = descend(p, Rates(30.0, 1.0, 30.0), 2, "bqpo")
    assert found.event["after"] <= found.event["before"] and found.event["tries"] == 2
    assert judged(p, found.canonical) == pytest.approx(found.event["after"], rel=1e-5)


def test_a_gain_that_may_be_chance_is_none():
    """Of two batches one gets better, and the other worse by nearly as much."""
    p = problem()

    def mixed(batch, weights):
        loss = p.loss(4, weights)
        return {4: loss, 5: 1 - 0.9 * loss}[batch] if batch in p.judge else p.loss(batch, weights)

    found = descend(TuningProblem(p.canonical, mixed, p.learn, p.judge), Rates(0.1, 0.01, 0.05), 3, "bqpo")
    assert found.event["rejected"] < found.event["before"] == found.event["after"]
    assert torch.equal(found.canonical["a"].dequantize(), p.canonical["a"].dequantize())
    sure = descend(TuningProblem(p.canonical, mixed, p.learn, (4,)), Rates(0.1, 0.01, 0.05), 3, "bqpo")
    assert "rejected" not in sure.event and sure.event["after"] < sure.event["before"]


def test_everything_that_is_judged_has_to_fall():
    p = problem()

    def judged(other):
        return lambda batch, weights: [float(p.loss(batch, weights)), other * float(p.loss(batch, weights))]

    def run(other):
        more = TuningProblem(p.canonical, p.loss, p.learn, p.judge, judged(other))
        return descend(more, Rates(0.1, 0.01, 0.05), 3, "distill")

    taken, refused = run(2.0), run(-1.0)
    assert taken.event["gains"][1] == pytest.approx(2 * taken.event["gains"][0]) and "rejected" not in taken.event
    assert refused.event["rejected"] < refused.event["after"] == refused.event["before"]
    assert torch.equal(refused.canonical["a"].dequantize(), p.canonical["a"].dequantize())


@pytest.mark.parametrize("lost, share", [(1.0, 1.0), (0.16, 1.0), (0.09, 0.75), (1e-3, 0.5), (0.0, 0.5)])
def test_distillation_is_bolder_where_more_was_lost(monkeypatch, lost, share):
    seen = []
    monkeypatch.setattr(distill, "descend", lambda problem, rates, epochs, stage: seen.append((rates, epochs, stage)))
    p = problem()
    told = TuningProblem(p.canonical, lambda *_: torch.tensor(lost), p.learn, p.judge)
    for epochs in (1, 100):  # 4 steps and 400
        Distill(epochs=epochs, lr_zeros=0.1).tune(told)
    assert [(epochs, stage) for _, epochs, stage in seen] == [(1, "distill"), (100, "distill")]
    for (rates, _, _), root in zip(seen, (8, 20), strict=True):
        assert [rates.weights, rates.scales, rates.zeros] == pytest.approx([share * r / root for r in (0.4, 0.04, 0.1)])


def test_slopes_that_are_none_are_left_out():
    p = problem()
    broken = TuningProblem(p.canonical, lambda b, w: p.loss(b, w) * float("nan"), p.learn, p.judge)
    found = descend(broken, Rates(0.1, 0.01, 0.05), 1, "bqpo")
    assert torch.equal(found.canonical["a"].dequantize(), p.canonical["a"].dequantize())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_is_broken_off_ends_the_same(stop):
    whole = descend(problem(), Rates(0.1, 0.01, 0.05), 4, "bqpo")
    state = {}

    def keep(tensors):
        state.clear()
        state.update({name: t.clone() for name, t in tensors.items()})
        if int(tensors["epoch"][0]) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descend(problem(keep=keep), Rates(0.1, 0.01, 0.05), 4, "bqpo")
    notes = []
    rest = descend(problem(kept=lambda: state, note=notes.append), Rates(0.1, 0.01, 0.05), 4, "bqpo")
    assert len(notes) == 4 - stop and rest.event == whole.event
    assert torch.equal(rest.canonical["a"].dequantize(), whole.canonical["a"].dequantize())


def test_the_second_stage_leaves_codes_columns_and_masks_as_they_are():
    from trifold.formats import pack

    p = problem()
    found = E2EOQP(lr_scales=0.01, epochs=3).tune(p)
    before, after = pack(p.canonical["a"]), pack(found.canonical["a"])
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"weight_scale"}
    assert found.event["after"] < found.event["before"]
    zeros = pack(E2EOQP(lr_scales=0.01, lr_zeros=0.2, epochs=3).tune(p).canonical["a"])
    assert {n for n in before if not torch.equal(before[n], zeros[n])} == {"weight_scale", "weight_zero_point"}


def test_nothing_to_tune():
    p = problem()
    assert BQPO(epochs=0).tune(p).canonical is p.canonical
    assert BQPO(lr_weights=0, lr_scales=0, lr_zeros=0).tune(p).canonical is p.canonical
