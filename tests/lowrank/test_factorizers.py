"""The methods against each other, their sizes, the shared budget and the residual."""

import itertools

import pytest
import torch

import trifold.compress.recipe  # noqa: F401  knows all methods
from tests.sparsity.problems import correlated
from trifold.core.allocation import allocate
from trifold.core.canonical import Chain, Dense, LowRank, Quantized, Sum
from trifold.core.method import METHODS, LayerProblem
from trifold.core.obs import NotFiniteError, relative_error
from trifold.core.scheme import Scheme
from trifold.formats import describe, stored_bytes
from trifold.lowrank import ASVD, SVD, SVDLLM, ReducedRank, Residual
from trifold.lowrank.metric import Metric

PLAIN = {"dtype": "float32", "multiple_of": 1}


def problem(seed=0, rows=96, columns=128, scheme=None):
    """A layer whose inputs have moved away from the dense model's; the dense inputs and those at hand."""
    weight, _ = correlated(seed, rows, columns)
    generator = torch.Generator().manual_seed(seed + 50)
    mix = torch.randn(columns, columns // 4, generator=generator, dtype=torch.float64)
    dense = mix @ torch.randn(columns // 4, 800, generator=generator, dtype=torch.float64)
    dense += 0.5 * torch.randn(columns, 800, generator=generator, dtype=torch.float64)
    dense *= torch.exp(0.8 * torch.randn(columns, 1, generator=generator, dtype=torch.float64))
    x = dense + 0.3 * dense.std() * torch.randn(dense.shape, generator=generator, dtype=torch.float64)
    schemes = {} if scheme is None else {"a": scheme}
    found = LayerProblem(
        {"a": weight}, schemes, x @ x.T, (dense - x) @ x.T, absmean=x.abs().mean(1).float(), mean=x.mean(1).float()
    )
    return found, dense, x


def solved(method, of):
    return method.solve(of).canonical["a"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_method_is_at_least_as_good_as_the_one_it_should_beat(seed):
    of, dense, x = problem(seed)
    weight = of.weights["a"]
    errors = {
        method: relative_error(weight, solved(method(rank=24, **PLAIN), of).dequantize(), of.gram)
        for method in (SVD, ASVD, SVDLLM)
    }
    assert errors[SVDLLM] < 0.98 * min(errors[ASVD], errors[SVD])
    wanted = weight.double() @ dense

    def to_dense(method):
        return float((wanted - solved(method, of).dequantize().double() @ x).square().sum())

    exact = {"rank": 24, "damping": 0.0, "pivot": False, **PLAIN}
    distances = [to_dense(ReducedRank(dense_targets=aim, **exact)) for aim in (0.0, 0.5, 1.0)]
    assert all(b < a for a, b in itertools.pairwise(distances)) and distances[2] < 0.95 * distances[0]
    own = solved(SVDLLM(rank=24, **PLAIN), of).dequantize()
    same = solved(ReducedRank(dense_targets=0.0, **exact), of).dequantize()
    assert relative_error(own, same, of.gram) < 1e-9


def test_regression_is_the_least_squares_map_of_its_rank():
    of, dense, x = problem(3, 20, 30)
    found = solved(ReducedRank(rank=7, dense_targets=1.0, damping=0.0, pivot=False, **PLAIN), of).dequantize().double()
    wanted = of.weights["a"].double() @ dense
    best = torch.linalg.lstsq(x.T, wanted.T).solution.T  # of any rank
    left, values, right = torch.linalg.svd(best @ x, full_matrices=False)
    expected = (left[:, :7] * values[:7]) @ right[:7]
    assert float((found @ x - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (61, 61), (256, 2048), (1, 9), (9, 1), (2, 2)])
@pytest.mark.parametrize("pivot", [True, False])
@pytest.mark.parametrize("scheme", [None, Scheme(4, 32)])
def test_a_share_is_never_exceeded_and_whole_where_factors_are_no_smaller(shape, pivot, scheme):
    for keep in (0.3, 0.6, 0.8, 0.95, 1.0):
        method = ReducedRank(keep=keep, pivot=pivot)
        rank, size = method.rank_of(shape, scheme), stored_bytes(describe(method.sketch(shape, scheme)))
        whole = method.full_cost(shape, scheme)
        if rank is None:
            assert size == whole
        else:
            smallest = 8 if min(shape) >= 32 else 1
            assert size < whole and (size <= keep * whole or rank == smallest)
    assert ReducedRank(keep=1.0).rank_of(shape, scheme) is None
    assert ReducedRank(rank=min(shape)).rank_of(shape, scheme) is None


def test_pivots_pay_for_more_rank():
    for keep in (0.6, 0.8):
        ranks = [
            ReducedRank(keep=keep, pivot=pivot, multiple_of=1).rank_of((512, 512), None) for pivot in (False, True)
        ]
        assert ranks[0] == int(keep * 512 / 2)
        assert abs(ranks[1] - 512 * (1 - (1 - keep) ** 0.5)) < 3  # r (2n - r) = keep n²


@pytest.mark.parametrize("pivot", [True, False])
def test_water_filling_is_never_worse_than_the_same_share_for_all(pivot):
    layers = {}
    for seed, (rows, columns) in enumerate([(64, 96), (96, 64), (64, 64), (32, 128)]):
        weight, gram = correlated(seed, rows, columns)
        layers[str(seed)] = (weight * (1 + 10 * (seed == 2)), gram)
    for keep in (0.3, 0.5, 0.8):
        even = ReducedRank(keep=keep, pivot=pivot, multiple_of=1)
        shared = ReducedRank(global_keep=keep, pivot=pivot, multiple_of=1)
        curves = {name: shared.curve(weight, None, gram) for name, (weight, gram) in layers.items()}
        whole = {name: shared.full_cost(tuple(weight.shape), None) for name, (weight, _) in layers.items()}
        budget = keep * sum(whole.values())
        shares = allocate(curves, budget)
        spent = lost = evenly = 0.0
        for name, (weight, gram) in layers.items():
            chosen = shared.at(shares[name])
            shape, energies = tuple(weight.shape), Metric.of(gram).energies(weight)
            rank = chosen.rank_of(shape, None)
            spent += stored_bytes(describe(chosen.sketch(shape, None)))
            lost += 0.0 if rank is None else float(energies[rank:].sum() / energies.sum())
            option = next(o for o in curves[name] if o.setting == shares[name])
            assert option.loss == pytest.approx(0.0 if rank is None else float(energies[rank:].sum() / energies.sum()))
            evenly += float(energies[even.rank_of(shape, None) :].sum() / energies.sum())
        assert lost <= evenly and budget - 3 * 2 * 160 <= spent <= budget


def adversarial(kind):
    """Weights and Gram matrices for which shares of a budget are hard to find."""
    generator = torch.Generator().manual_seed(3)
    flat = [torch.linalg.qr(torch.randn(40, 40, generator=generator))[0] for _ in range(3)]
    weights = [torch.randn(40, 40, generator=generator) for _ in range(3)]
    grams = [correlated(seed, 40, 40)[1] for seed in range(3)]
    if kind == "flat":
        return [(w, torch.eye(40, dtype=torch.float64)) for w in flat]
    if kind == "one dominates":
        return [(w * scale, g * scale) for w, g, scale in zip(weights, grams, (1e4, 1.0, 1e-4), strict=True)]
    if kind == "few directions":
        basis = torch.randn(40, 5, generator=generator, dtype=torch.float64)
        return [(weights[0], basis @ basis.T), *zip(weights[1:], grams[1:], strict=True)]
    if kind == "zero columns":
        grams[0][:30], grams[0][:, :30] = 0, 0
        weights[1][:, ::2] = 0
        return [*zip(weights, grams, strict=True), (torch.zeros(40, 40), grams[2])]
    return [(weights[0][:1], grams[0]), (weights[1][:, :1], grams[1][:1, :1]), (weights[2], grams[2])]


@pytest.mark.parametrize("kind", ["flat", "one dominates", "few directions", "zero columns", "one row, one column"])
@pytest.mark.parametrize("pivot", [True, False])
def test_water_filling_of_layers_that_make_it_hard(kind, pivot):
    layers = {str(i): layer for i, layer in enumerate(adversarial(kind))}

    def lost(name, method):
        weight, gram = layers[name]
        rank, energies = method.rank_of(tuple(weight.shape), None), Metric.of(gram).energies(weight)
        return 0.0 if rank is None else float(energies[rank:].sum() / energies.sum().clamp(min=1e-300))

    for keep in (0.3, 0.6, 0.8, 0.95):
        even, shared = (ReducedRank(**{k: keep}, pivot=pivot, multiple_of=1) for k in ("keep", "global_keep"))
        whole = {name: shared.full_cost(tuple(weight.shape), None) for name, (weight, _) in layers.items()}
        curves = {name: shared.curve(weight, None, gram) for name, (weight, gram) in layers.items()}
        shares = allocate(curves, keep * sum(whole.values()))
        chosen = {name: shared.at(share) for name, share in shares.items()}
        sizes = {n: stored_bytes(describe(m.sketch(tuple(layers[n][0].shape), None))) for n, m in chosen.items()}
        evenly = {n: stored_bytes(describe(even.sketch(tuple(layers[n][0].shape), None))) for n in layers}
        assert sum(sizes.values()) <= keep * sum(whole.values())
        if sum(evenly.values()) <= keep * sum(whole.values()):  # a row or a column stays whole, whatever its share
            assert sum(lost(n, m) for n, m in chosen.items()) <= sum(lost(n, even) for n in layers) + 1e-12


def test_a_layer_whose_factors_do_not_pay_stays_whole_in_a_budget():
    generator = torch.Generator().manual_seed(0)
    flat = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]  # all singular values alike
    steep = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    gram = torch.eye(64, dtype=torch.float64)
    shared = ReducedRank(global_keep=0.7, multiple_of=1)
    curves = {"flat": shared.curve(flat, None, gram), "steep": shared.curve(steep, None, gram)}
    shares = allocate(curves, 0.7 * 2 * shared.full_cost((64, 64), None))
    assert shared.at(shares["flat"]).rank_of((64, 64), None) is None
    assert 4 <= shared.at(shares["steep"]).rank_of((64, 64), None) < 20  # the budget's rest goes to what is left


@pytest.mark.parametrize("name", ["svd_llm", "reduced_rank", "residual"])
def test_broken_statistics_are_refused(name):
    of, *_ = problem(rows=12, columns=16, scheme=Scheme(4, 16))
    broken = of.gram.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(NotFiniteError):
        METHODS.get(name)().solve(LayerProblem(of.weights, of.schemes, broken, of.drift))


def test_rounded_factors_and_what_stays_whole():
    of, *_ = problem(4, 64, 96, Scheme(4, 32))
    cut = solved(ReducedRank(keep=0.7), of)
    assert isinstance(cut, Chain) and isinstance(cut.parts[-1], Quantized)
    assert isinstance(solved(ReducedRank(keep=1.0), of), Quantized)
    plain, *_ = problem(4, 64, 96)
    assert isinstance(solved(ReducedRank(keep=1.0), plain), Dense)
    assert isinstance(solved(SVDLLM(keep=0.7), plain), LowRank)


@pytest.mark.parametrize(
    "over", [{}, {"base": "sparsegpt", "base_options": {"pattern": "2:4"}}, {"base": "gqsa"}, {"base": "rtn"}]
)
def test_the_error_of_a_residual_is_the_tail_of_the_error_it_mends(over):
    of, *_ = problem(5, scheme=Scheme(3, 32))
    exact = {
        **over,
        "lr_bits": 3.0,
        "factor_bits": 16,
        "dtype": "float32",
        "turns": 1,
        "dense_targets": 0.0,
        "damping": 0.0,
    }
    found = solved(Residual(**exact), of)
    base, residual = found.parts
    weight, metric = of.weights["a"], Metric.of(of.gram)
    rank = residual.rank
    assert isinstance(found, Sum) and rank == Residual(**exact).rank_of((96, 128))
    tail = float(metric.energies(weight - base.dequantize())[rank:].sum())
    assert metric.loss(weight - found.dequantize()) == pytest.approx(tail, rel=1e-4)
    alone = METHODS.get(over.get("base", "gptq"))(**over.get("base_options", {})).solve(of).canonical["a"]
    assert torch.equal(alone.dequantize(), base.dequantize())


def test_more_turns_and_more_bits_are_never_worse_and_none_is_the_base_alone():
    of, *_ = problem(6, scheme=Scheme(2, 32))
    losses = []
    for turns in (1, 2, 4):
        solution = Residual(turns=turns, lr_bits=0.8, dense_targets=0.0).solve(of)
        event = solution.events["a"]["residual"]
        loss = Metric.of(of.gram, 0.01).loss(of.weights["a"] - solution.canonical["a"].dequantize())
        assert loss == pytest.approx(min(event["losses"]), rel=1e-6)
        assert event["losses"].index(min(event["losses"])) + 1 == event["turn"] <= turns
        losses.append(loss)
    assert losses[2] <= losses[1] <= losses[0]
    errors = []
    for bits in (0.0, 0.5, 1.0, 2.0):
        found = solved(Residual(lr_bits=bits, turns=1, dense_targets=0.0), of)
        errors.append(relative_error(of.weights["a"], found.dequantize(), of.gram))
        extra = stored_bytes(describe(found)) - stored_bytes(describe(solved(Residual(lr_bits=0), of)))
        assert 0 <= 8 * extra / of.weights["a"].numel() <= bits
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert isinstance(solved(Residual(lr_bits=0), of), Quantized)


def test_shared_bits_go_where_a_rank_brings_back_the_most():
    """What rounds badly in few directions gets the ranks of what rounds well, and all together lose less."""
    layers = {}
    for seed in range(4):
        weight, gram = correlated(seed, 64, 96)
        if seed < 2:
            generator = torch.Generator().manual_seed(seed)
            spikes = torch.randn(64, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
            weight = weight + 3 * weight.std() * spikes * (torch.rand(64, 96, generator=generator) > 0.97)
        layers[str(seed)] = (weight, gram)
    scheme, exact = Scheme(3, 32), {"factor_bits": 16, "dense_targets": 0.0, "turns": 1, "damping": 0.0}
    shared, even = Residual(global_lr_bits=2.0, **exact), Residual(lr_bits=2.0, **exact)
    curves = {name: shared.curve(weight, scheme, gram) for name, (weight, gram) in layers.items()}
    whole = {name: shared.full_cost(tuple(weight.shape), scheme) for name, (weight, _) in layers.items()}
    shares = allocate(curves, (1 - shared.budget.share) * sum(whole.values()))
    assert shared.budget.share == 1 - 2 / 16 and shared.rank_of((64, 96)) == even.rank_of((64, 96))
    lost, spent = {}, 0
    for kind in ("shared", "even"):
        lost[kind] = 0.0
        for name, (weight, gram) in layers.items():
            method = shared.at(shares[name]) if kind == "shared" else even
            found = method.solve(LayerProblem({"a": weight}, {"a": scheme}, gram)).canonical["a"]
            loss = relative_error(weight, found.dequantize(), gram)
            lost[kind] += loss
            if kind == "shared":
                option = next(o for o in curves[name] if o.setting == shares[name])
                extra = stored_bytes(describe(method.sketch((64, 96), scheme))) - stored_bytes(
                    describe(Residual(lr_bits=0).sketch((64, 96), scheme))
                )
                assert extra == option.cost and loss == pytest.approx(option.loss, rel=0.02, abs=1e-6)
                spent += extra
    assert spent <= 2.0 / 8 * 4 * 64 * 96 and lost["shared"] < lost["even"]
