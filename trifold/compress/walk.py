"""Walking over a model's blocks: each is compressed with what the compressed ones before it give."""

from __future__ import annotations

from typing import Any

import torch

from trifold.compress.block import BlockCompressor, Compressed, dense_tensors
from trifold.compress.capture import Call, Tail, capture_calls
from trifold.compress.job import Job
from trifold.compress.runner import BlockRunner
from trifold.core.linears import linears


class Walk:
    """Block after block: hidden states in, hidden states out.

    hidden: (batch, seq, hidden) per batch, of the model compressed so far. dense: the same of the dense model,
    empty if no method asks for it. carries: what block methods pass on, by step.
    """

    def __init__(self, job: Job) -> None:
        self.job, source = job, job.source
        self.blocks = source.model.get_submodule(source.blocks)
        self.carries: dict[str, Any] = {}
        captured = [capture_calls(source.model, self.blocks, ids.to(source.device)) for ids in job.ids]
        self.calls = [c.calls for c in captured]
        self.as_tuple = captured[0].as_tuple
        self.hidden = [c.hidden for c in captured]
        self.dense = list(self.hidden) if job.plan.follows_dense else []
        self.finished = 0

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
        targets = {n: m for n, m in linears(block).items() if prefix + n in job.plan.layers}
        runner = BlockRunner(block, targets, [calls[index] for calls in self.calls], self.hidden)
        compressor = BlockCompressor(block, prefix, job.plan, runner, job.observed, job.report.layer)
        compressor.rewrite(job.topology, self.carries)
        dense = compressor.follow_dense(self.dense) if self.dense else None
        result = compressor.solve(job.recipe.true_sequential)
        self.hidden, self.dense = runner.outputs(), dense.outputs() if dense else []
        result.tensors.update(dense_tensors(block, prefix, result.modules))
        source.close_block(index)
        self.finished += 1
        errors = [entry["error"] for entry in result.report.values()]
        job.report.block(index, source.block_count, self.finished, sum(errors) / max(len(errors), 1))
        return result

    def tail(self) -> tuple[Compressed, torch.Tensor]:
        """Compress what the recipe addresses behind the blocks; the reference logits of the first batch."""
        job, source = self.job, self.job.source
        tail = Tail(source.model, self.blocks, self.as_tuple)
        prefix = source.blocks + "."
        outside = {n: m for n, m in linears(source.model).items() if n in job.plan.layers}
        outside = {n: m for n, m in outside.items() if not n.startswith(prefix)}
        calls = [Call((ids.to(source.device),), {}, True) for ids in job.ids]
        result = Compressed()
        if outside:
            runner = BlockRunner(tail, outside, calls, self.hidden)
            compressor = BlockCompressor(tail, "", job.plan, runner, job.observed, job.report.layer)
            compressor.dense = BlockRunner(tail, outside, calls, self.dense) if self.dense else None
            result = compressor.solve(False)
        with torch.no_grad():
            logits = calls[0].run(tail, self.hidden[0])
        tied = getattr(source.model, "all_tied_weights_keys", None) or {}
        for name, tensor in dense_tensors(source.model, "", result.modules).items():
            if not name.startswith(prefix) and name not in tied:
                result.tensors[name] = tensor
        return result, logits
