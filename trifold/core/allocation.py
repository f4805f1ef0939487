"""How much of each layer to give up, so that what is lost in all is least: pure functions of measured curves."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trifold.core.errors import RecipeError


@dataclass(frozen=True)
class Option:
    """One way to treat a layer. setting: what it is, such as a sparsity. cost: what it takes, such as weights that
    stay. loss: what it loses, in a unit that adds up over layers."""

    setting: float
    cost: float
    loss: float


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price, from the cheapest to the best: cost rises, loss falls, and each
    further unit of cost buys less. Others are never worth their price."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        if hull and hull[-1].cost == option.cost:
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """Loss saved for each unit of cost from a to b."""
    return (a.loss - b.loss) / (b.cost - a.cost)


def allocate(curves: Mapping[str, Sequence[Option]], budget: float) -> dict[str, float]:
    """Greedy marginal allocation: layer -> setting, with the sum of costs at most `budget`.

    Everyone begins with the cheapest option; then whoever saves the most loss for its price takes the next one on its
    lower hull, while the budget lasts. Where it runs out exactly at such a step, no other choice loses less; between
    two steps, what is left buys options off the hull. No worse than if all took the same share of their dearest option:
    where steps are so large that it would be, that is where spending begins. Raises RecipeError if the cheapest
    options exceed the budget.
    """
    hulls = {name: lower_hull(options) for name, options in curves.items()}
    spent = sum(hull[0].cost for hull in hulls.values())
    if spent > budget * (1 + 1e-9):
        raise RecipeError(f"a budget of {budget:g} is below {spent:g}, the least that the layers can take")
    budget *= 1 + 1e-9
    found = [_spend_rest(curves, _along_hulls(hulls, budget), budget)]
    even = _even(curves, budget)
    if even is not None:
        found.append(_spend_rest(curves, even, budget))
    best = min(found, key=lambda chosen: sum(option.loss for option in chosen.values()))
    return {name: option.setting for name, option in best.items()}


def _along_hulls(hulls: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    places, spent = dict.fromkeys(hulls, 0), sum(hull[0].cost for hull in hulls.values())
    order = list(hulls)
    steps = [(-_slope(*hulls[name][:2]), number) for number, name in enumerate(order) if len(hulls[name]) > 1]
    heapq.heapify(steps)
    while steps:
        _, number = heapq.heappop(steps)
        hull, place = hulls[order[number]], places[order[number]]
        more = hull[place + 1].cost - hull[place].cost
        if spent + more > budget:
            continue  # a cheaper step of another layer may still fit
        spent, places[order[number]] = spent + more, place + 1
        if place + 2 < len(hull):
            heapq.heappush(steps, (-_slope(hull[place + 1], hull[place + 2]), number))
    return {name: hulls[name][places[name]] for name in hulls}


def _even(curves: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option] | None:
    """Of each layer the best option within the same share of its dearest one; None if one has none."""
    most = {name: max(option.cost for option in options) for name, options in curves.items()}
    share = budget / max(sum(most.values()), 1e-300)
    within = {name: [o for o in options if o.cost <= share * most[name]] for name, options in curves.items()}
    if not all(within.values()):
        return None
    return {name: min(options, key=lambda o: (o.loss, o.cost)) for name, options in within.items()}


def _spend_rest(
    curves: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], budget: float
) -> dict[str, Option]:
    """What is left goes to the best options that it can pay for, that of the layer that saves the most first."""
    found, rest = dict(chosen), budget - sum(option.cost for option in chosen.values())

    def best(name: str) -> Option:
        affordable = [o for o in curves[name] if o.cost <= found[name].cost + rest]
        return min(affordable, key=lambda o: (o.loss, o.cost), default=found[name])

    for name in sorted(found, key=lambda name: best(name).loss - found[name].loss):
        better = best(name)
        if better.loss < found[name].loss:
            rest -= better.cost - found[name].cost
            found[name] = better
    return found
