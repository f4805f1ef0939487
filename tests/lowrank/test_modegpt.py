"""MoDeGPT's three approximations: their errors are what the paper's identities say, to the last digits."""

import pytest
import torch

from trifold.core.allocation import Option
from trifold.core.errors import RecipeError
from trifold.lowrank.modegpt import nystrom, pairs, shares, values

D = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated(tokens, features, seed=0, rank=None):
    """(tokens, features) float64 with strong correlations and unequal sizes."""
    g = generator(seed)
    mix = torch.randn(rank or max(features // 2, 1), features, generator=g, dtype=D)
    x = torch.randn(tokens, len(mix), generator=g, dtype=D) @ mix
    noise = 0.0 if rank else 0.3
    return (x + noise * torch.randn(tokens, features, generator=g, dtype=D)) * torch.randn(
        features, generator=g, dtype=D
    ).exp()


# -- Type I ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "keep"), [(43, 17), (64, 63), (7, 1), (2, 1)])
def test_nystrom_error_is_the_schur_complement(width, keep):
    h, w = correlated(200, width), torch.randn(11, width, generator=generator(1), dtype=D)
    gram = h.T @ h
    (index,) = nystrom.by_removal(gram, w, [keep], damping=0.0)
    new = nystrom.refit(gram, w, index)
    seen = float((h @ w.T - h[:, index] @ new.T).square().sum())
    cross = gram[:, index]
    schur = gram - cross @ torch.linalg.solve(gram[index[:, None], index], cross.T)
    size = float((h @ w.T).square().sum())
    assert seen == pytest.approx(float((w @ schur @ w.T).trace()), abs=1e-11 * size)
    assert nystrom.lost_energy(gram, w, index, new) == pytest.approx(seen, abs=1e-11 * size)
    sliced = float((h @ w.T - h[:, index] @ w[:, index].T).square().sum())
    assert seen < sliced or keep == width


def test_one_removal_costs_what_the_score_says():
    h, w = correlated(100, 13), torch.randn(5, 13, generator=generator(2), dtype=D)
    gram = h.T @ h
    cost = w.square().sum(0) / torch.linalg.inv(gram).diagonal()
    for i in range(13):
        index = torch.tensor([j for j in range(13) if j != i])
        assert nystrom.lost_energy(gram, w, index, nystrom.refit(gram, w, index)) == pytest.approx(float(cost[i]))
    (index,) = nystrom.by_removal(gram, w, [12], damping=0.0)
    assert set(range(13)) - set(index.tolist()) == {int(cost.argmin())}


def test_removal_loses_less_than_leverage_and_sets_are_nested():
    lost = {"leverage": 0.0, "removal": 0.0}
    for seed in range(4):
        h, g = correlated(400, 97, seed), generator(seed + 10)
        w = torch.randn(31, 97, generator=g, dtype=D) * (0.6 * torch.randn(97, generator=g, dtype=D)).exp()
        gram = h.T @ h
        keeps = [80, 60, 40]
        nested = list(nystrom.by_removal(gram, w, keeps))
        assert [len(index) for index in nested] == keeps
        assert set(nested[2].tolist()) < set(nested[1].tolist()) < set(nested[0].tolist())
        for name, found in {"leverage": list(nystrom.by_leverage(gram, keeps)), "removal": nested}.items():
            lost[name] += nystrom.lost_energy(gram, w, found[1], nystrom.refit(gram, w, found[1]))
    assert lost["removal"] < 0.8 * lost["leverage"]


def test_nystrom_with_little_data_and_with_features_that_never_fire():
    h = correlated(400, 23, rank=6)
    h[:, 4] = 0
    w, gram = torch.randn(9, 23, generator=generator(3), dtype=D), h.T @ h
    (index,) = nystrom.by_removal(gram, w, [12])
    assert 4 not in index  # of no use
    new = nystrom.refit(gram, w, index, 1e-8)
    energy = float((h @ w.T).square().sum())
    assert torch.isfinite(new).all() and nystrom.lost_energy(gram, w, index, new) < 1e-8 * energy  # rank 6 needs 6
    every = torch.arange(23)
    assert torch.equal(nystrom.refit(gram, w, every), w)
    scores = nystrom.leverage(gram)
    assert scores[4] == pytest.approx(0.0) and scores.min() >= 0 and scores.max() <= 1
    nothing = torch.zeros(23, 23, dtype=D)
    (index,) = nystrom.by_removal(nothing, w, [5])
    assert torch.equal(nystrom.refit(nothing, w, index, 1e-4), w[:, index])
    assert len(next(nystrom.by_leverage(nothing, [5]))) == 5
    with pytest.raises(ValueError, match="not finite"):
        next(nystrom.by_removal(nothing + torch.nan, w, [5]))


# -- Type II -----------------------------------------------------------------------------------------------


def rotated(x, positions, frequencies):
    """x (tokens, d) turned in pairs (i, i + d / 2)."""
    angles = positions[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@pytest.mark.parametrize("groups", [1, 3])
def test_cr_error_of_grouped_queries(groups):
    kv, d, t = 2, 10, 50
    q = torch.stack([correlated(t, d, s) for s in range(kv * groups)])
    k = torch.stack([correlated(t, d, s + 50) for s in range(kv)])
    grams = q.mT @ q, k.mT @ k
    for score in ("diagonal", "block", "turned"):
        index = pairs.strongest(pairs.pair_scores(*grams, score), 2)
        kept = pairs.features(index, d)
        seen = 0.0
        for h in range(kv * groups):
            key, j = k[h // groups], kept[h // groups]
            seen += float((q[h] @ key.T - q[h][:, j] @ key[:, j].T).square().sum())
        assert pairs.score_error(*grams, kept) == pytest.approx(seen, rel=1e-11)
    one = torch.tensor([[0, 1, 2, 4]] * kv)  # pair 3 alone is dropped
    lost = pairs.score_error(*grams, pairs.features(one, d))
    assert lost == pytest.approx(float(pairs.pair_scores(*grams, "block")[:, 3].sum()), rel=1e-12)


def test_a_turned_score_is_the_mean_over_positions():
    q, k = correlated(30, 6, 1), correlated(30, 6, 2)
    frequencies = torch.tensor([0.7, 0.31, 0.083], dtype=D)
    p, total, positions = 1, 0.0, 2000
    keep = torch.zeros(6, dtype=D)
    keep[[p, p + 3]] = 1
    for position in range(positions):
        turned = rotated(q * keep, torch.full((30,), float(position), dtype=D), frequencies)
        total += float((turned @ (k * keep).T).square().sum())
    wanted = float(pairs.pair_scores((q.T @ q)[None], (k.T @ k)[None], "turned")[0, p])
    assert total / positions == pytest.approx(wanted, rel=1e-3)


def test_selection_commutes_with_rotation_only_at_the_original_frequencies():
    d, t = 14, 20
    x = torch.randn(t, d, generator=generator(4), dtype=D)
    positions = torch.randint(0, 5000, (t,), generator=generator(5)).double()
    frequencies = 10000.0 ** (-torch.arange(d // 2, dtype=D) / (d // 2))
    index = torch.tensor([[0, 2, 5]])
    kept = pairs.features(index, d)[0]
    after = rotated(x, positions, frequencies)[:, kept]
    assert torch.equal(rotated(x[:, kept], positions, frequencies[index[0]]), after)
    renumbered = 10000.0 ** (-torch.arange(3, dtype=D) / 3)
    assert (rotated(x[:, kept], positions, renumbered) - after).abs().max() > 0.5


@pytest.mark.parametrize("keep", [1, 4, 7])
@pytest.mark.parametrize("rank", [None, 3])
def test_without_rotation_the_error_is_the_tail(keep, rank):
    kv, groups, d, t = 2, 2, 7, 40
    q = torch.stack([correlated(t, d, s, rank) for s in range(kv * groups)])
    k = torch.stack([correlated(t, d, s + 9, rank) for s in range(kv)])
    summed, keys = (q.mT @ q).reshape(kv, groups, d, d).sum(1), k.mT @ k
    of_q, of_k = pairs.oblique_bases(summed, keys, keep)
    seen = 0.0
    for h in range(kv * groups):
        j = h // groups
        seen += float((q[h] @ k[j].T - (q[h] @ of_q[j].T) @ (k[j] @ of_k[j].T).T).square().sum())
    energy = sum(float((q[h] @ k[h // groups].T).square().sum()) for h in range(kv * groups))
    assert seen == pytest.approx(pairs.tail_energy(summed, keys, keep), abs=1e-9 * energy)
    scores = (summed * keys).diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    assert seen <= pairs.score_error(q.mT @ q, keys, scores[:, :keep]) + 1e-9 * energy  # any basis beats the given one


def test_grams_of_heads_with_biases():
    x, g = correlated(60, 9), generator(6)
    w, b = torch.randn(6, 9, generator=g, dtype=D), torch.randn(6, generator=g, dtype=D)
    y = (x @ w.T + b).reshape(60, 3, 2).transpose(0, 1)
    found = pairs.head_grams(w, b, x.T @ x, x.sum(0), 60, 3)
    assert torch.allclose(found, y.mT @ y, rtol=1e-10)


# -- Type III ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "keep"), [(1, 3), (3, 5), (4, 1), (2, 7)])
@pytest.mark.parametrize("rank", [None, 4])
def test_value_error_is_the_tail_of_the_concatenated_product(groups, keep, rank):
    kv, d, out, t = 2, 7, 11, 90
    v = torch.stack([correlated(t, d, s, rank) for s in range(kv)])
    o = torch.randn(out, kv * groups * d, generator=generator(7), dtype=D)
    maps, bases, singular = values.value_bases(v.mT @ v, o, keep)
    narrow = values.narrowed(o, bases)

    def lost(maps, narrow):
        total = 0.0
        for h in range(kv * groups):
            j = h // groups
            whole = v[j] @ o[:, h * d : (h + 1) * d].T
            cut = (v[j] @ maps[j]) @ narrow[:, h * keep : (h + 1) * keep].T
            total += float((whole - cut).square().sum())
        return total

    energy = lost(maps, torch.zeros_like(narrow))
    assert lost(maps, narrow) == pytest.approx(float(singular[:, keep:].sum()), abs=1e-9 * energy)
    alone, alone_bases, _ = values.value_bases(v.mT @ v, None, keep)
    assert lost(maps, narrow) <= lost(alone, values.narrowed(o, alone_bases)) + 1e-9 * energy
    wide = values.widened(narrow, maps).reshape(out, kv * groups, d)
    assert torch.allclose(wide[:, 0], narrow[:, :keep] @ maps[0].T)


def test_the_head_space_shortcut_is_the_optimum_of_the_wide_problem():
    kv, groups, d, hidden, out, keep, t = 1, 2, 5, 17, 8, 2, 80
    x, g = correlated(t, hidden), generator(8)
    w_v = torch.randn(d, hidden, generator=g, dtype=D)
    o = torch.randn(out, groups * d, generator=g, dtype=D)
    root = pairs.square_root(x.T @ x)  # of the inputs, as published
    joint = root @ w_v.T @ torch.cat(list(o.reshape(out, groups, d).transpose(0, 1).mT), dim=1)
    wanted = torch.linalg.svdvals(joint)[keep:].square().sum()
    v = x @ w_v.T
    _, _, singular = values.value_bases((v.T @ v)[None], o, keep)
    assert float(singular[0, keep:].sum()) == pytest.approx(float(wanted), rel=1e-9)
    assert kv == len(singular)


def test_refitting_the_output_on_what_heads_give_is_the_least_squares_optimum():
    kv, groups, d, out, keep, t = 2, 2, 6, 9, 3, 200
    heads = correlated(t, kv * groups * d)
    o = torch.randn(out, kv * groups * d, generator=generator(9), dtype=D)
    gram = heads.T @ heads
    own = gram.reshape(kv * groups, d, kv * groups, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    maps, bases, _ = values.value_bases(own.reshape(kv, groups, d, d).sum(1), o, keep)
    first, best = values.narrowed(o, bases), values.refit_output(gram, o, maps, bases)
    narrow_inputs = heads @ torch.block_diag(*maps.repeat_interleave(groups, 0))
    solved = torch.linalg.lstsq(narrow_inputs, heads @ o.T).solution.T
    assert torch.allclose(best, solved, rtol=1e-6, atol=1e-8)
    errors = [values.output_error(gram, o, values.widened(n, maps)) for n in (best, first)]
    assert errors[0] == pytest.approx(float((heads @ o.T - narrow_inputs @ best.T).square().sum()), rel=1e-9)
    assert errors[0] < 0.9 * errors[1]
    nothing = values.refit_output(torch.zeros_like(gram), o, maps, bases, 1e-4)
    assert torch.equal(nothing, first)


# -- how much each block keeps -----------------------------------------------------------------------------


def test_influence_shares_have_the_wanted_mean_also_when_clipped():
    found = shares.influence_shares([0.5, 0.1, 0.1, 0.05, 0.02, 0.3], 0.3, 0.05, 0.8)
    assert sum(found) / 6 == pytest.approx(0.3) and max(found) == 0.8
    assert found[4] >= found[3] >= found[1] == found[2] > found[5] > found[0]
    assert shares.influence_shares([0.2, 0.2], 0.4, 0.1, 0.8) == pytest.approx([0.4, 0.4])
    assert shares.influence_shares([0.0, 1e6], 0.4, 1e-3, 0.7) == pytest.approx([0.7, 0.1])
    assert shares.influence_shares([0.3, 0.1], 0.9, 0.1, 0.8) == [0.8, 0.8]


def test_sizes_meet_the_budget_to_a_step():
    whole = [{"qk": 32, "v": 32, "mlp": 701}] * 3
    steps, unit = [{"qk": 4, "v": 4, "mlp": 8}] * 3, [{"qk": 600, "v": 600, "mlp": 192}] * 3
    budget = 0.8 * sum(whole[b][p] * unit[b][p] for b in range(3) for p in whole[b])
    for wanted in (0.5, 0.79, 0.81, 1.0):
        dims = [{p: shares.stepped(size, wanted, steps[0][p]) for p, size in whole[0].items()}] * 3
        found = shares.fitted(dims, whole, steps, unit, budget)
        spent = sum(found[b][p] * unit[b][p] for b in range(3) for p in found[b])
        assert wanted == 0.5 or budget - 8 * 192 < spent
        assert spent <= budget and all(found[b][p] <= whole[b][p] for b in range(3) for p in found[b])
    with pytest.raises(RecipeError, match="keep more"):
        shares.fitted([{"qk": 4}], [{"qk": 32}], [{"qk": 4}], [{"qk": 10}], 10)
    assert [shares.grain(n, 64, 64) for n in (11008, 768, 86, 2)] == [64, 8, 1, 1]
    assert [shares.grain(n, 8, 8, 2) for n in (128, 64, 32, 12)] == [8, 8, 4, 2]


def test_curves_never_lose_more_than_equal_sizes():
    def options(scale):
        return [Option(size, size * 10, scale * (10 - size) ** 2) for size in range(1, 11)]

    curves = [{"mlp": options(1.0), "v": options(9.0)}, {"mlp": options(0.1), "v": options(4.0)}]

    def lost(dims):
        return sum(curves[b][part][size - 1].loss for b, sizes in enumerate(dims) for part, size in sizes.items())

    found = shares.by_curves(curves, 240)
    assert sum(10 * size for sizes in found for size in sizes.values()) <= 240
    assert lost(found) < 0.6 * lost([{"mlp": 6, "v": 6}] * 2)
