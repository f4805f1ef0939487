"""The loop that both stages of recovery share: Adam with a falling rate, and the best state that was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trifold.core.method import TuningProblem, TuningSolution
from trifold.tuning.tunable import tunable

_BETAS, _EPSILON = (0.9, 0.95), 1e-12
_TRIES, _BACK_OFF = 2, 0.3
_SURE = 2.0  # standard errors by which what is judged has to fall


@dataclass(frozen=True)
class Rates:
    """Learning rates by kind of parameter; 0 leaves a kind as it is."""

    weights: float = 0.0
    scales: float = 0.0
    zeros: float = 0.0

    def items(self) -> list[tuple[str, float]]:
        return [(kind, rate) for kind, rate in vars(self).items() if rate > 0]


def descend(problem: TuningProblem, rates: Rates, epochs: int, stage: str) -> TuningSolution:
    """Tune what was decided; the state with the least loss on the batches to judge by wins, if everything that is
    judged is better than at first by more than two standard errors of the paired difference. Else the same is tried
    more slowly, and if that is not surely better either, all stays as it was, bit for bit.

    Between epochs the state is kept, so that a run that was broken off goes on to the same result.
    """
    kinds = frozenset(kind for kind, _ in rates.items())
    tunables = {name: tunable(c, kinds) for name, c in problem.canonical.items()}
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "rate": rate}
        for kind, rate in rates.items()
        if (parameters := [p for t in tunables.values() for p in t.of_kind(kind)])
    ]
    parameters = [p for group in groups for p in group["params"]]
    if not parameters or not epochs:
        return TuningSolution(problem.canonical, {"stage": stage, "epochs": 0})
    optimiser = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON)
    weights = {name: t.weight for name, t in tunables.items()}
    state = _State(parameters, optimiser)
    kept = problem.kept()
    if kept is None:
        state.begin(_judged(problem, weights))
    else:
        state.load(kept)
    steps = epochs * len(problem.learn)
    while True:
        share = _BACK_OFF**state.tries
        for epoch in range(state.epoch, epochs):
            generator = torch.Generator().manual_seed(problem.seed * 1000003 + epoch)
            for turn, place in enumerate(torch.randperm(len(problem.learn), generator=generator).tolist()):
                done = epoch * len(problem.learn) + turn
                for group in optimiser.param_groups:
                    group["lr"] = share * group["rate"] * 0.5 * (1 + math.cos(math.pi * done / steps))
                _step(problem.loss(problem.learn[place], weights), parameters, optimiser)
            state.finish_epoch(_judged(problem, weights))
            losses = f"loss {_mean(state.last):.4e}  best {_mean(state.best):.4e}  began at {_mean(state.first):.4e}"
            problem.note(f"{stage}: epoch {epoch + 1}/{epochs}{' slower' if state.tries else ''}  {losses}")
            problem.keep(state.tensors())
        if state.improved or state.tries == _TRIES - 1:
            break
        state.retry()
    better, (gains, errors) = state.improved, state.gains()
    state.restore(better)
    event = {
        "stage": stage,
        "epochs": epochs,
        "tries": state.tries + 1,
        "before": _mean(state.first),
        "after": _mean(state.best),
        "gains": gains.tolist(),
        "standard_errors": errors.tolist(),
    }
    if not better:
        event |= {"after": event["before"], "rejected": event["after"]}
    return TuningSolution({name: t.canonical() for name, t in tunables.items()}, event)


def _step(loss: torch.Tensor, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Adam) -> None:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if not all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
        return
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


@torch.no_grad()
def _judged(problem: TuningProblem, weights: Mapping[str, Callable[[], torch.Tensor]]) -> torch.Tensor:
    """(batches to judge by, numbers of each)."""
    judged = problem.judged or (lambda batch, weights: [float(problem.loss(batch, weights))])
    return torch.tensor([judged(batch, weights) for batch in problem.judge], dtype=torch.float64)


def _mean(losses: torch.Tensor) -> float:
    """Of the loss itself."""
    return float(losses[:, 0].mean())


class _State:
    """Everything that the next epoch depends on. first, best, last: what was judged, (batches, numbers)."""

    def __init__(self, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Adam) -> None:
        self.parameters, self.optimiser, self.epoch, self.tries = parameters, optimiser, 0, 0
        self.first = self.best = self.last = torch.empty(0)
        self._winner = [p.detach().clone() for p in parameters]

    def begin(self, losses: torch.Tensor) -> None:
        self.first = self.best = self.last = losses

    def finish_epoch(self, losses: torch.Tensor) -> None:
        self.epoch, self.last = self.epoch + 1, losses
        if _mean(losses) < _mean(self.best):
            self.best, self._winner = losses, [p.detach().clone() for p in self.parameters]

    def retry(self) -> None:
        """Begin again."""
        self.epoch, self.tries, self.best = 0, self.tries + 1, self.first
        self.restore(False)
        self.optimiser.state.clear()

    @property
    def improved(self) -> bool:
        """Whether the best state surely beats the first one, in everything."""
        gains, errors = self.gains()
        return bool((gains > _SURE * errors).all())

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much the best state beats the first one, and standard errors of that over the batches."""
        gains = self.first - self.best
        errors = gains.std(0) / math.sqrt(len(gains)) if len(gains) > 1 else torch.zeros_like(gains[0])
        return gains.mean(0), errors

    def restore(self, best: bool) -> None:
        """The best state, or the first one, whose parameters are 0."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._winner, strict=True):
                parameter.copy_(value) if best else parameter.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        losses = torch.stack([self.first, self.best, self.last])
        found = {"epoch": torch.tensor([self.epoch, self.tries]), "losses": losses}
        for number, parameter in enumerate(self.parameters):
            moments = self.optimiser.state.get(parameter, {})
            found[f"{number}.value"], found[f"{number}.best"] = parameter.detach(), self._winner[number]
            found.update({f"{number}.{name}": value for name, value in moments.items()})
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.epoch, self.tries = tensors["epoch"].tolist()
        self.first, self.best, self.last = tensors["losses"]
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"{number}.value"])
                self._winner[number] = tensors[f"{number}.best"].to(parameter.device)
                moments = {
                    n: tensors[k] for n in ("step", "exp_avg", "exp_avg_sq") if (k := f"{number}.{n}") in tensors
                }
                if moments:
                    on = {n: t if n == "step" else t.to(parameter.device) for n, t in moments.items()}
                    self.optimiser.state[parameter] = on
