"""Recovery in the pipeline: a block against the dense one, and the whole model on its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trifold.compress.block import BlockCompressor, Compressed
from trifold.compress.capture import Call, Tail, capture_calls
from trifold.compress.job import Job
from trifold.compress.journal import Journal
from trifold.compress.tensor_file import Entry
from trifold.core.canonical import Canonical
from trifold.core.linears import is_transposed, linears
from trifold.core.method import Tuner, TuningProblem
from trifold.formats import layout, unpack
from trifold.kernels import unstack

if TYPE_CHECKING:
    from trifold.compress.walk import Walk

_JUDGED = 8  # one batch in so many chooses among states, and is not learned from

Weights = Mapping[str, Callable[[], torch.Tensor]]


def divide(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to learn from, and to judge by; of one batch both."""
    judge = list(range(batches))[_JUDGED - 1 :: _JUDGED] or ([batches - 1] if batches > 1 else [0])
    return [b for b in range(batches) if b not in judge] or [0], judge


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
    solution = tuner.tune(
        TuningProblem(chosen, loss, learn, judge, job.recipe.seed, lambda text: note(f"{prefix[:-1]}  {text}"))
    )
    job.report.notice(f"{prefix[:-1]}: {_told(solution.event)}")
    for name, canonical in solution.canonical.items():
        compressor.replace(name, canonical, {str(solution.event["stage"]): dict(solution.event)})


def _told(event: Mapping[str, Any]) -> str:
    if "before" not in event:
        return f"{event['stage']} has nothing to tune"
    return f"{event['stage']} loss {event['before']:.4e} -> {event['after']:.4e}"


class ModelTuning:
    """The whole compressed model in memory, blocks and what is outside of them, for one tuner after another.

    Packed tensors come from the journal and from the tail; results take their place in `tensors`, by block.
    """

    def __init__(self, walk: Walk, journal: Journal, everything: Compressed) -> None:
        self.walk, self.journal, self.everything = walk, journal, everything
        source = walk.job.source
        self.tensors: list[dict[str, Entry]] = [journal.block_tensors(index) for index in range(source.block_count)]
        ids = [batch.to(source.device) for batch in walk.job.ids]
        self.ids, self.starts = ids, []
        for batch in ids:
            self.starts.append(capture_calls(source.model, walk.blocks, batch).hidden.clone())
        self.linears: list[dict[str, nn.Module]] = []
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

    def _open(self, index: int) -> nn.Module:
        """The block with what is not compressed as the journal has it."""
        prefix, source = self._prefix(index), self.walk.job.source
        block = source.open_block(index)
        packed = {n.removeprefix(prefix) for n in self.everything.modules if n.startswith(prefix)}
        unstack(block, packed)
        self.linears.append({name: module for name, module in linears(block).items() if name in packed})
        for name, parameter in block.named_parameters():
            stored = self.tensors[index].get(prefix + name)
            owner, _, leaf = name.rpartition(".")
            if owner in packed and leaf == "weight":
                parameter.data = parameter.data.new_empty(0)  # always substituted
            elif stored is not None:
                parameter.data = stored.load().to(parameter.device, parameter.dtype)
        return block

    def logits(self, batch: int, weights: Weights, keep: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Of one batch. keep: filled with the hidden states behind each block."""
        hidden = self.starts[batch]
        for index, block in enumerate(self.blocks):
            prefix, call = self._prefix(index), self.walk.calls[batch][index]
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            inside = Substituted(block, self.linears[index], own)
            if torch.is_grad_enabled():
                hidden = checkpoint(call.run, inside, hidden, use_reentrant=False)
            else:
                hidden = call.run(inside, hidden)
            if keep is not None:
                keep.append(hidden)
        return Call((self.ids[batch],), {}, True).run(self.tail, hidden)

    def loss(self, batch: int, weights: Weights) -> torch.Tensor:
        """Nats for each next token."""
        logits, ids = self.logits(batch, weights), self.ids[batch]
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def tune(self, step: str, tuner: Tuner, names: Sequence[str]) -> None:
        """Run one tuner on these layers; what it decides is in `tensors`, `everything` and the references."""
        fixed = {n: _fixed(c) for n, c in self.canonical.items() if n not in names}
        learn, judge = divide(len(self.ids))
        state, report = f"tuning-{step}", self.walk.job.report
        problem = TuningProblem(
            {name: self.canonical[name] for name in names},
            lambda batch, weights: self.loss(batch, {**fixed, **weights}),
            learn,
            judge,
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
    def keep_references(self) -> None:
        """What the proof compares with, of the tuned model."""
        hidden: list[torch.Tensor] = []
        logits = self.logits(0, {name: _fixed(c) for name, c in self.canonical.items()}, hidden)
        for index, states in enumerate(hidden):
            self.journal.keep(f"reference-{index:05d}", {"hidden": states})
        self.journal.keep("reference-logits", {"logits": logits})

    def close(self) -> None:
        """Give the blocks' memory back."""
        for index in range(len(self.blocks)):
            self.walk.job.source.close_block(index)


def _fixed(canonical: Canonical) -> Callable[[], torch.Tensor]:
    return canonical.dequantize
