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
