"""Walking over a model's blocks: each is compressed with what the compressed ones before it give."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from trifold.compress.block import BlockCompressor, dense_tensors
from trifold.compress.capture import Call, Tail, capture_calls, own_state
from trifold.compress.compressed import Compressed
from trifold.compress.job import Job
from trifold.compress.memory import ROOM, Room, give_back
from trifold.compress.rewrite import rewrite_block
from trifold.compress.runner import BlockRunner
from trifold.compress.scratch import Slab
from trifold.compress.tensor_file import Entry
from trifold.core.linears import is_embedding, linears
from trifold.core.method import LayerProblem
from trifold.formats import bits_per_weight, layout, unpack
from trifold.kernels import unstack


class Walk:
    """Block after block: hidden states in, hidden states out.

    hidden: (batch, seq, hidden) per batch, of the model compressed so far. dense: the same of the dense model,
    empty if no method asks for it. carries: what block methods pass on, by step. room: of what is gathered.
    """

    def __init__(self, job: Job, room: Room = ROOM) -> None:
        self.job, self.room, source = job, room, job.source
        self.blocks = source.model.get_submodule(source.blocks)
        self.carries: dict[str, Any] = {}
        self._replaced: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._slabs: list[Slab] = []
        self.outside = Compressed()
        try:
            self._round_embeddings()
            self._capture()
        except BaseException:
            self.__exit__()
            raise
        self.dense: list[torch.Tensor] = []
        self._resting = source.close_ends()
        if self._resting:
            self._replaced.clear()
        give_back()
        if job.plan.follows_dense:
            self.dense = self.beside(self.hidden)
        self.dense_calls = [own_state(calls) for calls in self.calls] if self.dense else []
        values = [v for calls in self.calls for c in calls for v in (*c.args, *c.kwargs.values())]
        self.shares_state = any(isinstance(value, dict) for value in values)
        self.finished = 0

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        """A live model is changed only at completion: outside the blocks it gets its weights back."""
        for parameter, weight in self._replaced:
            parameter.data = weight

    def _capture(self) -> None:
        """What the blocks are called with. Hidden states lie side by side: they stay for the whole walk, and the heap
        does not fragment around them."""
        source = self.job.source
        self.calls: list[list[Call]] = []
        for ids in self.job.ids:
            captured = capture_calls(source.model, self.blocks, ids.to(source.device))
            slab = self._slabs[0] if self._slabs else self._slab(captured.hidden)
            slab.add(captured.hidden)
            self.calls.append(captured.calls)
            self.arity = captured.arity
        self.hidden = slab.parts

    def _slab(self, first: torch.Tensor) -> Slab:
        """Room for hidden states of all batches. first: those of the first batch."""
        ids = self.job.ids
        elements = first.numel() // ids[0].numel() * sum(batch.numel() for batch in ids)
        place = ("cpu", self.room.folder) if self.room.offload else (self.job.source.device, None)
        self._slabs.append(Slab(elements, first.dtype, *place))
        return self._slabs[-1]

    def beside(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of hidden states, for another stream."""
        slab = self._slab(hidden[0])
        for states in hidden:
            slab.add(states)
            self.release(states)
        return slab.parts

    def forget(self, hidden: list[torch.Tensor]) -> None:
        """Give the memory of such a stream back."""
        self._slabs = [slab for slab in self._slabs if slab.parts is not hidden]

    def release(self, states: torch.Tensor) -> None:
        """These hidden states are not needed for a while."""
        for slab in self._slabs:
            slab.release(states)

    def state(self) -> list[Entry]:
        """All hidden states, to be written one batch at a time."""

        def entry(states: torch.Tensor) -> Entry:
            def load() -> torch.Tensor:
                copy = states.to("cpu", copy=True)
                self.release(states)
                return copy

            return Entry(tuple(states.shape), states.dtype, load)

        return [entry(states) for states in (*self.hidden, *self.dense)]

    def _round_embeddings(self) -> None:
        """Compress the embeddings that the recipe names: the blocks then see what the packed ones give."""
        job = self.job
        for name, plan in job.plan.layers.items():
            if name.startswith(job.source.blocks + "."):
                continue
            module = job.source.model.get_submodule(name)
            if not is_embedding(module):
                continue
            parameter = module.get_parameter("weight")
            weight = parameter.data.float()
            schemes = {} if plan.scheme is None else {name: plan.scheme}
            canonical = plan.method.solve(LayerProblem({name: weight}, schemes)).canonical[name]
            self.outside.add(name, canonical)
            rounded = canonical.dequantize()
            entry = {
                "error": float((weight - rounded).square().sum() / weight.square().sum().clamp(min=1e-30)),
                "error_of": "weight",
                "bits_per_weight": bits_per_weight(self.outside.modules[name]),
            }
            self.outside.report[name] = entry
            job.report.layer(name, entry)
            self._replaced.append((parameter, parameter.data))
            parameter.data = rounded.to(parameter.dtype)

    def _wake(self) -> None:
        """Read embeddings and head again, as the packed ones are."""
        if not self._resting:
            return
        self._resting, model = False, self.job.source.model
        self.job.source.open_ends()
        for name, spec in self.outside.modules.items():
            stored = {leaf: self.outside.tensors[f"{name}.{leaf}"] for leaf in layout(spec)}
            parameter = model.get_submodule(name).get_parameter("weight")
            parameter.data = unpack(stored, spec).dequantize().to(parameter.device, parameter.dtype)

    def starts(self) -> list[torch.Tensor]:
        """The hidden states that enter the first block. Of a walk that has not begun."""
        assert not self.finished and not self.carries
        return self.hidden

    def resume(self, carries: dict[str, Any], hidden: Iterable[torch.Tensor]) -> None:
        """Take up the states behind the last finished block."""
        self.carries = carries
        places = [(stream, batch) for stream in (self.hidden, self.dense) for batch in range(len(stream))]
        for (stream, batch), states in zip(places, hidden, strict=True):
            if stream[batch].shape == states.shape and stream[batch].dtype == states.dtype:
                self.release(stream[batch].copy_(states))
            else:
                stream[batch] = states.to(self.job.source.device)

    def block(self, index: int) -> Compressed:
        """Compress one block and step the hidden states over it."""
        job, source = self.job, self.job.source
        prefix = f"{source.blocks}.{index}."
        block = source.open_block(index)
        source.prefetch(index + 1)
        named = {*job.plan.layers, *(name for _, method, names in job.plan.rewrites if method.cuts for name in names)}
        wanted = {name.removeprefix(prefix) for name in named if name.startswith(prefix)}
        if any(calls[index].skipped for calls in self.calls):
            job.report.notice(f"{prefix[:-1]}: text alone does not run this block, so it stays dense")
            wanted = set()
        unstack(block, wanted)
        targets = {name: module for name, module in linears(block).items() if name in wanted}
        calls = [calls[index] for calls in self.calls]
        runner = BlockRunner(block, targets, calls, self.hidden, self.room.remembered, self.release, job.processes)
        for name in runner.bypassed:
            job.report.notice(f"{prefix}{name}: its weight is used without calling it, so it stays dense")
        compressor = BlockCompressor(block, prefix, job.plan, runner, job.observed, job.report.layer, self.room)
        rewrite_block(compressor, job.topology, self.carries)
        dense = None
        if self.dense:
            dense = compressor.follow_dense([calls[index] for calls in self.dense_calls], self.dense, self.release)
        with compressor.rounded_inputs():
            result = compressor.solve(job.recipe.true_sequential)
            self.dense = dense.advance() if dense else []
            self._tune(compressor)
            self.hidden = compressor.runner.advance()
        for notice in compressor.experts.notices(prefix):
            job.report.notice(notice)
        compressor.experts.release()
        result.tensors.update(dense_tensors(block, prefix, result.modules))
        source.close_block(index)
        give_back()
        self.finished += 1
        errors = [entry["error"] for entry in result.report.values()]
        job.report.block(index, source.block_count, self.finished, sum(errors) / max(len(errors), 1))
        return result

    def _tune(self, compressor: BlockCompressor) -> None:
        """Run the recipe's block tuners on a solved block, towards the dense stream behind it."""
        from trifold.compress.tune import tune_block

        for _, tuner, chosen in self.job.plan.tuners:
            names = [name for name in compressor.canonical if compressor.prefix + name in chosen]
            if tuner.level == "block" and names:
                compressor.runner.forget()
                tune_block(compressor, tuner, names, self.dense, self.job)

    def tail(self) -> tuple[Compressed, torch.Tensor]:
        """Compress what the recipe addresses behind the blocks; the reference logits of the first batch."""
        job, source = self.job, self.job.source
        self._wake()
        tail = Tail(source.model, self.blocks, self.arity)
        prefix = source.blocks + "."
        outside = {n: m for n, m in linears(source.model).items() if n in job.plan.layers}
        outside = {n: m for n, m in outside.items() if not n.startswith(prefix)}
        calls = [Call((ids.to(source.device),), {}, True) for ids in job.ids]
        result = self.outside
        for module in outside.values():
            parameter = module.get_parameter("weight")
            self._replaced.append((parameter, parameter.data))
        with ExitStack() as stack, torch.no_grad():
            if outside:
                held = (self.room.remembered, self.release, job.processes)
                runner = BlockRunner(tail, outside, calls, self.hidden, *held)
                compressor = BlockCompressor(tail, "", job.plan, runner, job.observed, job.report.layer, self.room)
                compressor.dense = BlockRunner(tail, outside, calls, self.dense, *held) if self.dense else None
                stack.enter_context(compressor.rounded_inputs())
                solved = compressor.solve(False)
                result.note(solved.modules, solved.report, solved.digests)
                result.tensors.update(solved.tensors)
            logits = calls[0].run(tail, self.hidden[0].to(source.device))
        tied = getattr(source.model, "all_tied_weights_keys", None) or {}
        kept = {n for n in source.model.state_dict() if not n.startswith(prefix) and n not in tied}
        result.tensors.update(dense_tensors(source.model, "", result.modules, kept))
        return result, logits
