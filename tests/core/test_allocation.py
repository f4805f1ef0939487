import itertools
import random

import pytest

from trifold.core.allocation import Option, allocate, lower_hull
from trifold.core.errors import RecipeError


def curve(*points):
    return [Option(cost, cost, loss) for cost, loss in points]


def total(curves, chosen, what):
    return sum(getattr(o, what) for name, s in chosen.items() for o in curves[name] if o.setting == s)


def test_the_hull_has_what_is_worth_its_price():
    hull = lower_hull(curve((1, 10), (2, 9), (3, 4), (4, 4), (5, 3.9), (6, 5)))
    assert [(o.cost, o.loss) for o in hull] == [(1, 10), (3, 4), (5, 3.9)]
    assert lower_hull(curve((1, 1))) == curve((1, 1))
    assert [(o.cost, o.loss) for o in lower_hull(curve((2, 5), (2, 3), (1, 3)))] == [(1, 3)]


def test_the_steepest_goes_first():
    curves = {"a": curve((1, 10), (2, 0)), "b": curve((1, 5), (2, 0)), "c": curve((1, 1), (2, 0))}
    assert allocate(curves, 4) == {"a": 2, "b": 1, "c": 1}
    assert allocate(curves, 5) == {"a": 2, "b": 2, "c": 1}
    assert allocate(curves, 100) == {"a": 2, "b": 2, "c": 2}
    with pytest.raises(RecipeError, match="a budget of 2 is below 3"):
        allocate(curves, 2)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_optimal_where_the_budget_runs_out_at_a_step(seed):
    generator = random.Random(seed)
    curves = {}
    for name in "abcd":
        falls = sorted((generator.uniform(0, 5) for _ in range(4)), reverse=True)
        losses = [20 - sum(falls[:i]) for i in range(5)]
        curves[name] = curve(*((i + 1, loss) for i, loss in enumerate(losses)))
    for budget in range(4, 21):
        chosen = allocate(curves, budget)
        assert total(curves, chosen, "cost") == budget
        best = min(
            sum(o.loss for o in options)
            for options in itertools.product(*curves.values())
            if sum(o.cost for o in options) <= budget
        )
        assert total(curves, chosen, "loss") == pytest.approx(best)


def even(curves, budget):
    share = budget / sum(max(o.cost for o in options) for options in curves.values())
    found = 0.0
    for options in curves.values():
        most = max(o.cost for o in options)
        found += min(o.loss for o in options if o.cost <= share * most * (1 + 1e-9))
    return found


def concave(price, size=40):
    """Nothing but the whole is on the hull: every unit buys more than the one before."""
    return curve(*((i, price * (1 - (i / size) ** 2)) for i in range(1, size + 1)))


ADVERSARIAL = {
    "all alike, and the whole the only step": {name: concave(1.0) for name in "ab"},
    "straight lines": {name: curve(*((i, 40.0 - i) for i in range(1, 41))) for name in "abc"},
    "one dominates": {"a": concave(1e9), "b": concave(1.0), "c": curve((1, 2.0), (2, 1.0), (40, 0.5))},
    "one takes all": {"a": concave(1.0, 400), "b": curve((1, 1.0), (2, 0.0)), "c": curve((3, 0.7))},
    "nothing to gain": {"a": curve((1, 0.0), (2, 0.0), (30, 0.0)), "b": concave(0.0)},
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_it_is_never_worse_than_the_same_share_for_all(case):
    curves = ADVERSARIAL[case]
    most = sum(max(o.cost for o in options) for options in curves.values())
    least = sum(min(o.cost for o in options) for options in curves.values())
    for share in (0.1, 0.3, 0.5, 0.8, 0.99, 1.0):
        budget = share * most
        if budget < least:
            continue
        chosen = allocate(curves, budget)
        assert total(curves, chosen, "cost") <= budget * (1 + 1e-6)
        if all(min(o.cost for o in c) <= share * max(o.cost for o in c) for c in curves.values()):
            assert total(curves, chosen, "loss") <= even(curves, budget) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_nor_for_curves_of_any_shape(seed):
    generator = random.Random(seed)
    curves = {}
    for name in "abcd":
        losses = sorted((generator.uniform(0, 10) for _ in range(9)), reverse=True)
        curves[name] = curve(*zip([1, *sorted(generator.sample(range(2, 60), 8))], losses, strict=True))
    for share in (0.5, 0.7, 0.9):
        budget = share * sum(c[-1].cost for c in curves.values())
        chosen = allocate(curves, budget)
        assert total(curves, chosen, "cost") <= budget
        assert total(curves, chosen, "loss") <= even(curves, budget) * (1 + 1e-9)
