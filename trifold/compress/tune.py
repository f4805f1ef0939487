"""Recovery in the pipeline: a block against the dense one, and the whole model on its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from trifold.compress.block import BlockCompressor
from trifold.compress.capture import Call, Tail, capture_calls, own_state
from trifold.compress.compressed import Compressed
from trifold.compress.job import Job
from trifold.compress.journal import Journal, reference
from trifold.compress.tensor_file import Entry
from trifold.core.canonical import Canonical
from trifold.core.linears import is_transposed, linears, weight_of
from trifold.core.method import Tuner, TuningProblem
from trifold.core.observe import watch
from trifold.formats import layout, unpack
from trifold.kernels import unstack

if TYPE_CHECKING:
    from trifold.compress.walk import Walk

_JUDGED = 4  # the last one of so many parts of the text chooses among states, and is not learned from

Weights = Mapping[str, Callable[[], torch.Tensor]]


def divide(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to learn from, and to judge by: other documents, but for one; of one batch both.

    What was learned from a document makes the rest of it easier, and says little of other text.
    """
    first = batches - -(-batches // _JUDGED)
    return list(range(first)) or [0], list(range(first, batches))


class Substituted(nn.Module):
    """A module run with other weights for some of its linears. linears: name -> module, by name in the module."""

    def __init__(self, module: nn.Module, linears: Mapping[str, nn.Module], weights: Weights) -> None:
        super().__init__()
        self._given = (module, linears, weights)  # in a tuple, so that they are no submodules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module, linears, weights = self._given
        values = {}
        for name, weight in weights.items():
            value, own = weight(), linears[name].get_parameter("weight")
            values[f"{name}.weight"] = (value.T if is_transposed(linears[name]) else value).to(own.dtype)
        return torch.func.functional_call(module, values, args, kwargs)


def tune_block(
    compressor: BlockCompressor, tuner: Tuner, names: Sequence[str], targets: Sequence[torch.Tensor], job: Job
) -> None:
    """Tune these layers of a solved block, whose inputs are the runner's; targets: what the dense block gives."""
    runner, prefix = compressor.runner, compressor.prefix
    chosen = {name: compressor.canonical[name] for name in names}

    def loss(batch: int, weights: Weights) -> torch.Tensor:
        block = Substituted(compressor.module, runner.linears, weights)
        found = runner.calls[batch].run(block, runner.states(batch)).float()
        target = targets[batch].to(found.device).float()
        return (found - target).square().sum() / target.square().sum().clamp(min=1e-30)

    learn, judge = divide(len(runner.hidden))
    note = job.report.detail
    problem = TuningProblem(
        chosen, loss, learn, judge, seed=job.recipe.seed, note=lambda text: note(f"{prefix[:-1]}  {text}")
    )
    solution = tuner.tune(problem)
    job.report.notice(f"{prefix[:-1]}: {_told(solution.event)}")
    for name, canonical in solution.canonical.items():
        compressor.replace(name, canonical, {str(solution.event["stage"]): dict(solution.event)})
    errors = OutputErrors({name: (compressor.weights[name], solution.canonical[name]) for name in names})
    for batch in range(len(runner.hidden)):
        for name, inputs in runner.inputs(batch, names).items():
            for x in inputs:
                errors.see(name, x)
    for name, error in errors.found.items():
        compressor.done.report[prefix + name]["error"] = error


class OutputErrors:
    """Relative output errors on inputs that pass by. pairs: name -> the dense weight (out, in), and what it became."""

    def __init__(self, pairs: Mapping[str, tuple[torch.Tensor, Canonical]]) -> None:
        self._pairs = {name: (weight.float(), decided.dequantize()) for name, (weight, decided) in pairs.items()}
        self._sums = {name: [0.0, 0.0] for name in pairs}

    def see(self, name: str, x: torch.Tensor) -> None:
        """x: (..., in)."""
        weight, decided = self._pairs[name]
        x = x.reshape(-1, x.shape[-1]).float()
        for place, matrix in enumerate((weight - decided, weight)):
            self._sums[name][place] += float((x @ matrix.T).square().sum(dtype=torch.float64))

    @property
    def found(self) -> dict[str, float]:
        """Of the layers that had any output."""
        return {name: lost / whole for name, (lost, whole) in self._sums.items() if whole > 0}


def _told(event: Mapping[str, Any]) -> str:
    if "before" not in event:
        return f"{event['stage']} has nothing to tune"
    return f"{event['stage']} loss {event['before']:.4e} -> {event['after']:.4e}"


class ModelTuning:
    """The whole compressed model in memory, blocks and what is outside of them, for one tuner after another.

    Packed tensors come from the journal and from the tail; results take their place in `tensors`, by block. Batches
    are those of calibration, then those of the text that only tuners see.
    """

    def __init__(self, walk: Walk, journal: Journal, everything: Compressed) -> None:
        self.walk, self.journal, self.everything = walk, journal, everything
        source = walk.job.source
        self.tensors: list[dict[str, Entry]] = [journal.block_tensors(index) for index in range(source.block_count)]
        self.ids = [batch.to(source.device) for batch in (*walk.job.ids, *walk.job.more_batches)]
        self.starts, self.calls = list[torch.Tensor](), list[list[Call]]()
        for batch in self.ids:
            captured = capture_calls(source.model, walk.blocks, batch)
            self.starts.append(captured.hidden.clone())
            self.calls.append(captured.calls)
        self.calls[: len(walk.calls)] = walk.calls
        self.dense = list(walk.dense)
        if walk.job.plan.follows_dense:
            self.dense += self._dense(len(walk.dense))
        self.linears: dict[int, dict[str, nn.Module]] = {}
        self.blocks = [self._open(index) for index in range(source.block_count)]
        self.tail = Tail(source.model, walk.blocks, walk.arity)
        self.canonical = {name: c for index in range(source.block_count) for name, c in self._decided(index)}

    def _prefix(self, index: int) -> str:
        return f"{self.walk.job.source.blocks}.{index}."

    def _decided(self, index: int) -> Iterator[tuple[str, Canonical]]:
        prefix, device = self._prefix(index), self.walk.job.source.device
        for name, spec in self.everything.modules.items():
            if name.startswith(prefix):
                stored = {leaf: self.tensors[index][f"{name}.{leaf}"] for leaf in layout(spec)}
                yield name, unpack({leaf: entry.load().to(device) for leaf, entry in stored.items()}, spec)

    @torch.no_grad()
    def _dense(self, first: int) -> list[torch.Tensor]:
        """What the dense blocks make of the batches from this one on."""
        hidden, calls = self.starts[first:], [own_state(calls) for calls in self.calls[first:]]
        source = self.walk.job.source
        for index in range(source.block_count if hidden else 0):
            block = source.open_block(index)
            hidden = [own[index].run(block, states) for own, states in zip(calls, hidden, strict=True)]
            source.close_block(index)
        return hidden

    def _open(self, index: int, dense: dict[str, torch.Tensor] | None = None) -> nn.Module:
        """The block with what is not compressed as the journal has it. dense: filled with the weights before, where
        the source still has them."""
        prefix, source, job = self._prefix(index), self.walk.job.source, self.walk.job
        block = source.open_block(index)
        packed = {n.removeprefix(prefix) for n in self.everything.modules if n.startswith(prefix)}
        unstack(block, packed)
        self.linears[index] = {name: module for name, module in linears(block).items() if name in packed}
        if dense is not None and not job.plan.rewrites and not job.options.inplace:
            dense.update({name: weight_of(module).clone() for name, module in self.linears[index].items()})
        for name, parameter in block.named_parameters():
            stored = self.tensors[index].get(prefix + name)
            owner, _, leaf = name.rpartition(".")
            if owner in packed and leaf == "weight":
                parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)  # always substituted
            elif stored is not None:
                parameter.data = stored.load().to(parameter.device, parameter.dtype)
        return block

    def logits(self, batch: int, weights: Weights) -> torch.Tensor:
        """Of one batch."""
        hidden = self.starts[batch]
        for index, block in enumerate(self.blocks):
            prefix, call = self._prefix(index), self.calls[batch][index]
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            inside = Substituted(block, self.linears[index], own)
            if torch.is_grad_enabled():
                hidden = checkpoint(call.run, inside, hidden, use_reentrant=False)
            else:
                hidden = call.run(inside, hidden)
        return self._behind(batch, hidden)

    def loss(self, batch: int, weights: Weights, dense: bool) -> torch.Tensor:
        """Nats for each token: the divergence from what the dense blocks give, or those of the next one in the text."""
        logits = self.logits(batch, weights)
        return self._divergence(batch, logits) if dense else self._next_token(batch, logits)

    def judged(self, batch: int, weights: Weights, dense: bool) -> list[float]:
        """The loss, and with it the other one: what brings a model closer to the dense one may still be worse at the
        text, by more than there was to be gained."""
        logits = self.logits(batch, weights)
        losses = [self._divergence, self._next_token] if dense else [self._next_token]
        return [float(loss(batch, logits)) for loss in losses]

    def _divergence(self, batch: int, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._behind(batch, self.dense[batch]).flatten(0, 1).float().log_softmax(-1)
        found = logits.flatten(0, 1).float().log_softmax(-1)
        return kl_div(found, wanted, reduction="batchmean", log_target=True)

    def _next_token(self, batch: int, logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[batch][:, 1:].flatten())

    def _behind(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of the last hidden states."""
        return Call((self.ids[batch],), {}, True).run(self.tail, hidden)

    def tune(self, step: str, tuner: Tuner, names: Sequence[str]) -> None:
        """Run one tuner on these layers; what it decides is in `tensors`, `everything` and the references."""
        fixed = {n: _fixed(c) for n, c in self.canonical.items() if n not in names}
        learn, judge = divide(len(self.ids))
        state, report = f"tuning-{step}", self.walk.job.report
        problem = TuningProblem(
            {name: self.canonical[name] for name in names},
            lambda batch, weights: self.loss(batch, {**fixed, **weights}, tuner.follows_dense),
            learn,
            judge,
            lambda batch, weights: self.judged(batch, {**fixed, **weights}, tuner.follows_dense),
            self.walk.job.recipe.seed,
            report.notice,
            lambda tensors: self.journal.keep(state, tensors),
            lambda: self.journal.kept(state) if self.journal.has(state) else None,
        )
        solution = tuner.tune(problem)
        done = Compressed()
        for name, canonical in solution.canonical.items():
            self.canonical[name] = canonical
            done.add(name, canonical)
            self.everything.report[name][str(solution.event["stage"])] = dict(solution.event)
        self.everything.note(done.modules, {}, done.digests)
        for index, tensors in enumerate(self.tensors):
            tensors.update({k: Entry.of(t) for k, t in done.tensors.items() if k.startswith(self._prefix(index))})

    @torch.no_grad()
    def finish(self) -> None:
        """Keep what the proof compares with, and note the errors of the layers, of the tuned model."""
        hidden, source = self.starts[: len(self.walk.calls)], self.walk.job.source
        for index in range(source.block_count):
            prefix, dense = self._prefix(index), dict[str, torch.Tensor]()
            source.close_block(index)
            block = self._open(index, dense)
            decided = {name: self.canonical[prefix + name] for name in self.linears[index]}
            errors = OutputErrors({name: (weight, decided[name]) for name, weight in dense.items()})
            inside = Substituted(block, self.linears[index], {name: c.dequantize for name, c in decided.items()})
            with watch({name: self.linears[index][name] for name in dense}, errors.see):
                hidden = [c[index].run(inside, h) for c, h in zip(self.walk.calls, hidden, strict=True)]
            for name in decided:
                entry = self.everything.report[prefix + name]
                if name in errors.found:
                    entry["error"] = errors.found[name]
                elif "e2e_oqp" in entry:
                    entry["error_of"] += " before e2e_oqp"
            self.journal.keep(reference(index), {"hidden": hidden[0]})
            source.close_block(index)
        self.journal.keep("reference-logits", {"logits": self._behind(0, hidden[0])})


def _fixed(canonical: Canonical) -> Callable[[], torch.Tensor]:
    return canonical.dequantize
