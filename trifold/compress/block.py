"""Compressing one decoder block: gather statistics and solve its linears, stage by stage."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from trifold.compress.capture import Call
from trifold.compress.compressed import Compressed
from trifold.compress.experts import ExpertTokens
from trifold.compress.memory import ROOM, Room, give_back
from trifold.compress.plan import LayerPlan, Plan
from trifold.compress.runner import BlockRunner
from trifold.compress.scratch import Release, keep, spill
from trifold.compress.seen import Seen
from trifold.core.canonical import Canonical, Quantized, stacked, with_rounded_input
from trifold.core.errors import CheckpointError
from trifold.core.linears import set_weight, weight_of
from trifold.core.method import Bounds, LayerProblem, LayerSolution, Statistics
from trifold.core.obs import NotFiniteError, output_losses, ratio_of
from trifold.core.product import product
from trifold.core.scheme import Scheme
from trifold.core.statistics import AbsMax, Drift, Gram, Statistic
from trifold.formats import bits_per_weight, describe, rounds_input

_ROWS_WORTH_SHARING = 16  # for each process: both factorise the same Gram matrix
LayerDone = Callable[[str, dict[str, Any]], None]


class BlockCompressor:
    """Solves the linears of one block (or of the tail behind the blocks) in place and collects the outcome.

    prefix: full name of the module, with a dot. observed: whether the hidden states come from calibration
    text; if not, only data-free methods run and errors are those of the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        plan: Plan,
        runner: BlockRunner,
        observed: bool,
        layer_done: LayerDone,
        room: Room = ROOM,
    ) -> None:
        self.room = room
        self.dense: BlockRunner | None = None
        self._undo: list[Callable[[], Any]] = []
        self.module, self.prefix, self.plan, self.runner = module, prefix, plan, runner
        self.observed, self.layer_done = observed, layer_done
        self.weights = {name: weight_of(m) for name, m in runner.linears.items()}  # until they are solved
        self.shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        self.widths = {name: shape[1] for name, shape in self.shapes.items()}
        self.seen: dict[str, Seen] = {}  # by stage leader, where an earlier pass gathered it
        self.bounds: dict[str, Bounds] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.experts = ExpertTokens(module, plan.min_expert_tokens)
        self.canonical: dict[str, Canonical] = {}  # of finished layers that will be tuned
        self.done = Compressed()

    def layer_plan(self, name: str) -> LayerPlan:
        return self.plan.layers[self.prefix + name]

    def _schemes(self, names: Sequence[str]) -> dict[str, Scheme]:
        schemes = {name: self.layer_plan(name).scheme for name in names}
        return {name: scheme for name, scheme in schemes.items() if scheme is not None}

    def gather(self, names: Sequence[str], kinds: Sequence[type[Statistic]]) -> dict[str, Statistics]:
        """One pass over the batches for the stages that hold these linears, by stage leader.

        What does not fit into memory together takes several passes, and waits in files. An expert that too few
        tokens reach is shown all of them in another pass, and from then on.
        """
        unique = list(dict.fromkeys(kinds))
        leaders = [stage[0] for stage in self.runner.stages if set(stage) & set(names)]

        def gather(chosen: Sequence[str]) -> dict[str, Statistics]:
            statistics = {
                name: Statistics(unique, self.widths[name], weight_of(self.runner.linears[name]).device)
                for name in chosen
            }
            if statistics:
                self.runner.observe(statistics, self.dense if Drift in unique else None)
            return statistics

        def gather_in_waves(chosen: Sequence[str]) -> dict[str, Statistics]:
            waves = list(self._affordable([[name] for name in chosen], unique))
            found = {}
            for wave in waves:
                statistics = gather([name for (name,) in wave])
                for held in statistics.values() if len(waves) > 1 else ():
                    spill(held, self.room.folder)
                found.update(statistics)
            return found

        statistics = gather_in_waves(leaders)
        return statistics | gather_in_waves(self.experts.starving({name: s.tokens for name, s in statistics.items()}))

    @contextmanager
    def rounded_inputs(self) -> Iterator[None]:
        """While it lasts, solved layers with an input scheme see rounded activations."""
        try:
            yield
        finally:
            for undo in self._undo:
                undo()
            self._undo.clear()

    def follow_dense(self, calls: Sequence[Call], hidden: list[torch.Tensor], release: Release = keep) -> BlockRunner:
        """Keep the block as it is now beside the one that is being compressed, on the dense hidden states."""
        dense = copy.deepcopy(self.module)
        linears = {name: dense.get_submodule(name) for name in self.runner.linears}
        self.dense = BlockRunner(dense, linears, calls, hidden, self.room.remembered, release)
        return self.dense

    def solve(self, true_sequential: bool) -> Compressed:
        """Solve every stage in order of execution; the module ends up with the dequantised weights."""
        if self.observed and not true_sequential and not self.seen:
            gathered = self.gather(list(self.widths), (Gram, *self._needs(self.widths) - {Drift}))
            self.seen = {leader: Seen.of(s) for leader, s in gathered.items()}
        for wave in self.runner.waves:
            for stages in self._affordable(wave):
                started = time.perf_counter()
                seen = self._statistics(stages, true_sequential)
                gathering = (time.perf_counter() - started) / len(stages)
                shared = self._share_out(stages, seen)
                for stage in stages:
                    started = time.perf_counter()
                    solutions = shared or self._solve_stage(stage, seen[stage[0]])
                    seconds = (gathering + time.perf_counter() - started) / len(stage)
                    for name in stage:
                        self._settle(name, solutions[name], seen[stage[0]], seconds)
                    del solutions, seen[stage[0]]
                    self.seen.pop(stage[0], None)
                    for runner in filter(None, (self.runner, self.dense)):
                        runner.finish(stage)
                give_back()
        return self.done

    def _needs(self, names: Iterable[str]) -> set[type[Statistic]]:
        """What the methods of these layers, and static scales of their inputs, want to know."""
        known = (self.plan.layers.get(self.prefix + name) for name in names)
        plans = [plan for plan in known if plan is not None]  # what is cut alone has none
        static = {AbsMax} if any(plan.input is not None and plan.input.static for plan in plans) else set()
        return static | {kind for plan in plans for kind in plan.method.gathers}

    def _affordable(
        self, wave: Sequence[Sequence[str]], kinds: Sequence[type[Statistic]] = ()
    ) -> Iterator[list[Sequence[str]]]:
        """A wave in parts whose statistics fit into memory together, those of `kinds` among them."""
        part: list[Sequence[str]] = []
        budget = self.room.for_statistics()
        held = 0
        for stage in wave:
            wanted: set[type[Statistic]] = {Gram, *self._needs(stage), *kinds}
            size = sum(kind.nbytes(self.widths[stage[0]]) for kind in wanted)
            if part and held + size > budget:
                yield part
                part, held = [], 0
            part.append(stage)
            held += size
        if part:
            yield part

    def _statistics(self, stages: Sequence[Sequence[str]], true_sequential: bool) -> dict[str, Seen]:
        """What is known of each stage's input, by leader: from an earlier pass where nothing newer is needed."""
        if not self.observed:
            return {stage[0]: Seen() for stage in stages}
        found: dict[str, Seen] = {}
        fresh: dict[str, set[type[Statistic]]] = {}
        for stage in stages:
            needs, known = self._needs(stage), self.seen.get(stage[0])
            if known is not None and known.holds(needs) and not (needs and true_sequential):
                found[stage[0]] = known
            else:
                fresh[stage[0]] = needs
        kinds = sorted(set().union(*fresh.values()), key=lambda kind: kind.__name__)
        gathered = self.gather(list(fresh), (Gram, *kinds))
        return found | {leader: Seen.of(statistics) for leader, statistics in gathered.items()}

    def _share_out(self, stages: Sequence[Sequence[str]], seen: Mapping[str, Seen]) -> dict[str, LayerSolution]:
        """What the processes of this run decide about these stages, each about its share; empty for one process."""
        processes, leaders = self.runner.processes, {name: stage[0] for stage in stages for name in stage}
        if processes.size == 1:
            return {}
        divided = {name for name in leaders if self._by_rows(name)}
        rows: dict[str, LayerSolution] = {}
        for stage in stages:
            names = [name for name in stage if name in divided]
            rows.update(self._solve_stage(names, seen[stage[0]], processes.rank, processes.size) if names else {})
        parts = [processes.same(rows, owner, self.runner.device) for owner in range(processes.size if divided else 0)]
        costs = {n: self.weights[n].numel() * float(self.widths[n]) for n in leaders if n not in divided}
        shares = processes.shares(costs)
        mine: dict[str, LayerSolution] = {}
        for stage in stages:
            names = [name for name in stage if name in shares[processes.rank]]
            mine.update(self._solve_stage(names, seen[stage[0]]) if names else {})
        owners = {name: rank for rank, names in enumerate(shares) for name in names}
        whole = {name: processes.same(mine.get(name), owners[name], self.runner.device) for name in costs}
        return whole | {name: _joined(name, [part[name] for part in parts]) for name in sorted(divided)}

    def _by_rows(self, name: str) -> bool:
        """Whether each process solves some rows of a layer."""
        plan = self.layer_plan(name)
        enough = len(self.weights[name]) >= _ROWS_WORTH_SHARING * self.runner.processes.size
        return enough and plan.method.by_rows(plan.scheme)

    def _solve_stage(self, stage: Sequence[str], seen: Seen, part: int = 0, parts: int = 1) -> dict[str, LayerSolution]:
        """Layers of one method are solved together; of several parts of their rows one."""

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.tensor_split(parts)[part]

        def bounds(name: str) -> Bounds:
            scale, zero = self.bounds[name]
            return rows(scale), None if zero is None else rows(zero)

        by_method: dict[Any, list[str]] = {}
        for name in stage:
            by_method.setdefault(self.layer_plan(name).method, []).append(name)
        solutions = {}
        for method, names in by_method.items():
            problem = LayerProblem(
                {name: rows(self.weights[name]).float() for name in names},
                self._schemes(names),
                seen.gram,
                seen.drift,
                {name: bounds(name) for name in names if name in self.bounds},
                seen.sample,
                seen.absmean,
                seen.mean,
                seen.tokens,
            )
            try:
                solution = method.solve(problem)
            except NotFiniteError as error:
                raise CheckpointError(f"{self.prefix}{names[0]}: {error}; check the model and the text") from error
            solutions.update(dict.fromkeys(names, solution))
        return solutions

    def _settle(self, name: str, solution: LayerSolution, seen: Seen, seconds: float) -> None:
        plan, canonical, module = self.layer_plan(name), solution.canonical[name], self.runner.linears[name]
        weight = canonical.dequantize()
        set_weight(module, weight)
        shift = solution.shifts.get(name)
        new_bias = shift is not None and _shift(module, shift)
        if plan.input is not None:
            rounding = plan.input
            if rounding.static and (seen.absmax is None or not seen.absmax.any()):
                rounding = replace(rounding, static=False)
                self.events.setdefault(name, {})["input"] = "never used in calibration: scales are found at run time"
            canonical = with_rounded_input(canonical, rounding, seen.absmax)
            if rounds_input(describe(canonical)):
                self._round_input(module, canonical)
        self.done.add(self.prefix + name, canonical, new_bias)
        dense = self.weights.pop(name)
        if any(self.prefix + name in tuned for _, _, tuned in self.plan.tuners):
            self.canonical[name], self.weights[name] = canonical, dense
        entry = {
            "error": self._error(dense, weight, seen.gram),
            "error_of": "output" if seen.gram is not None else "weight",
            "bits_per_weight": bits_per_weight(self.done.modules[self.prefix + name]),
            "seconds": round(seconds, 4),
            **self.experts.event(name),
            **self.events.get(name, {}),
            **solution.events.get(name, {}),
        }
        self.done.report[self.prefix + name] = entry
        self.layer_done(self.prefix + name, entry)

    def _error(self, dense: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor | None) -> float:
        """`relative_error`, of which each process finds the share of some rows."""
        processes = self.runner.processes
        mine, approximation = (w.tensor_split(processes.size)[processes.rank] for w in (dense, weight))
        return ratio_of(*processes.total(*output_losses(mine.float(), approximation, gram)))

    def replace(self, name: str, canonical: Canonical, event: Mapping[str, Any]) -> None:
        """Put another decision of the same structure in the place of a layer's."""
        self.canonical[name] = canonical
        set_weight(self.runner.linears[name], canonical.dequantize())
        self.done.add(self.prefix + name, canonical, self.done.modules[self.prefix + name].get("bias", False))
        self.done.report[self.prefix + name].update(event)

    def _round_input(self, module: nn.Module, canonical: Canonical) -> None:
        """Let a solved linear do to its input what the packed one will, with products in float32: a last bit less
        would send many activations behind it to another code."""
        multiply, bias = product(canonical, torch.float32), getattr(module, "bias", None)

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = multiply(x.float())
            return (y if bias is None else y + bias.float()).to(x.dtype)

        own = vars(module).get("forward")  # set by others
        module.forward = forward
        self._undo.append(
            partial(vars(module).pop, "forward") if own is None else partial(setattr, module, "forward", own)
        )


def _joined(name: str, parts: Sequence[LayerSolution]) -> LayerSolution:
    """A layer's decision from those about its rows, which saw the same statistics."""
    rows = [part.canonical[name] for part in parts]
    assert not any(part.shifts for part in parts)
    return LayerSolution({name: stacked([r for r in rows if isinstance(r, Quantized)])}, parts[0].events)


def _shift(module: nn.Module, shift: torch.Tensor) -> bool:
    """Add to a linear's bias; whether it had none."""
    bias = getattr(module, "bias", None)
    if bias is None:
        module.bias = nn.Parameter(shift.to(weight_of(module).dtype), requires_grad=False)
        return True
    bias.data = (bias.data.float() + shift).to(bias.dtype)
    return False


def dense_tensors(
    module: nn.Module, prefix: str, solved: Mapping[str, Any], only: Container[str] | None = None
) -> dict[str, torch.Tensor]:
    """What stays as it is: every persistent tensor but the solved weights, by full name; of `only` these."""
    return {
        prefix + name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if (only is None or name in only)
        and ((prefix + name).removesuffix(".weight") not in solved or not name.endswith(".weight"))
    }
