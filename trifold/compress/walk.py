"""Walking over a model's blocks: each is compressed with what the compressed ones before it give."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from trifold.compress.block import BlockCompressor, Compressed, dense_tensors
from trifold.compress.capture import Call, Tail, capture_calls, own_state
from trifold.compress.job import Job
from trifold.compress.memory import give_back
from trifold.compress.runner import BlockRunner
from trifold.core.linears import is_embedding, linears
from trifold.core.method import LayerProblem
from trifold.formats import bits_per_weight
from trifold.kernels import unstack


class Walk:
    """Block after block: hidden states in, hidden states out.

    hidden: (batch, seq, hidden) per batch, of the model compressed so far. dense: the same of the dense model,
    empty if no method asks for it. carries: what block methods pass on, by step.
    """

    def __init__(self, job: Job) -> None:
        self.job, source = job, job.source
        self.blocks = source.model.get_submodule(source.blocks)
        self.carries: dict[str, Any] = {}
        self._replaced: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.outside = Compressed()
        try:
            self._round_embeddings()
            captured = [capture_calls(source.model, self.blocks, ids.to(source.device)) for ids in job.ids]
        except BaseException:
            self.__exit__()
            raise
        self.calls = [c.calls for c in captured]
        self.arity = captured[0].arity
        self.hidden = _in_one_piece([c.hidden for c in captured])
        del captured
        give_back()
        self.dense = _in_one_piece(self.hidden) if job.plan.follows_dense else []
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

    def starts(self) -> list[torch.Tensor]:
        """The hidden states that enter the first block. Of a walk that has not begun."""
        assert not self.finished and not self.carries
        return self.hidden

    def resume(self, entries: list[dict[str, Any]], hidden: list[torch.Tensor]) -> None:
        """Take up the states behind the last finished block."""
        self.carries, count = entries[-1]["carries"], len(self.hidden)
        hidden = [states.to(self.job.source.device) for states in hidden]
        self.hidden, self.dense = hidden[:count], hidden[count:]

    def block(self, index: int) -> Compressed:
        """Compress one block and step the hidden states over it."""
        job, source = self.job, self.job.source
        prefix = f"{source.blocks}.{index}."
        block = source.open_block(index)
        named = {*job.plan.layers, *(name for _, method, names in job.plan.rewrites if method.cuts for name in names)}
        wanted = {name.removeprefix(prefix) for name in named if name.startswith(prefix)}
        if any(calls[index].skipped for calls in self.calls):
            job.report.notice(f"{prefix[:-1]}: text alone does not run this block, so it stays dense")
            wanted = set()
        unstack(block, wanted)
        targets = {name: module for name, module in linears(block).items() if name in wanted}
        runner = BlockRunner(block, targets, [calls[index] for calls in self.calls], self.hidden)
        for name in runner.bypassed:
            job.report.notice(f"{prefix}{name}: its weight is used without calling it, so it stays dense")
        compressor = BlockCompressor(block, prefix, job.plan, runner, job.observed, job.report.layer)
        compressor.rewrite(job.topology, self.carries)
        dense = None
        if self.dense:
            dense = compressor.follow_dense([calls[index] for calls in self.dense_calls], self.dense)
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
                runner = BlockRunner(tail, outside, calls, self.hidden)
                compressor = BlockCompressor(tail, "", job.plan, runner, job.observed, job.report.layer)
                compressor.dense = BlockRunner(tail, outside, calls, self.dense) if self.dense else None
                stack.enter_context(compressor.rounded_inputs())
                solved = compressor.solve(False)
                result.note(solved.modules, solved.report, solved.digests)
                result.tensors.update(solved.tensors)
            logits = calls[0].run(tail, self.hidden[0])
        tied = getattr(source.model, "all_tied_weights_keys", None) or {}
        kept = {n for n in source.model.state_dict() if not n.startswith(prefix) and n not in tied}
        result.tensors.update(dense_tensors(source.model, "", result.modules, kept))
        return result, logits


def _in_one_piece(states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that lie side by side: they stay for the whole walk, and the heap does not fragment around them."""
    slab = torch.cat([s.reshape(-1) for s in states])
    parts = slab.split([s.numel() for s in states])
    return [part.view(s.shape) for part, s in zip(parts, states, strict=True)]
