"""Running one block over the calibration batches in stages, each linear once.

Linears that see the same input form a stage. A stage's inputs are observed with everything before it already
compressed; then its own weights become final, and their outputs are remembered for the stages that follow. So
the sequential protocol costs one forward pass of the linears and two of the attention.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from trifold.compress.capture import Call
from trifold.core.method import Statistics
from trifold.core.observe import Enough, Memory, observe, remembered, watch

MEMORY_SHARE = 0.25  # of the memory free at the start of a block may hold remembered outputs


class BlockRunner:
    """One block, its calls and the hidden states that enter it: (batch, seq, hidden) per batch."""

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        calls: Sequence[Call],
        hidden: Sequence[torch.Tensor],
        memory: int | None = None,
    ) -> None:
        self.block, self.linears, self.calls, self.hidden = block, dict(linears), calls, hidden
        self._final: set[str] = set()
        self._outputs = [Memory() for _ in hidden]
        self._memory = _free_memory() * MEMORY_SHARE if memory is None else memory
        self._held = 0
        self._repeated = False
        self.stages = self._find_stages()

    @torch.no_grad()
    def _find_stages(self) -> list[list[str]]:
        seen: dict[tuple[Any, ...], list[str]] = {}
        kept: list[torch.Tensor] = []  # alive, so that no address is used twice

        def see(name: str, x: torch.Tensor) -> None:
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            if any(name in names for names in seen.values()):
                self._repeated = True
                return
            kept.append(x)
            seen.setdefault(key, []).append(name)

        with watch(self.linears, see):
            self.calls[0].run(self.block, self.hidden[0])
        unseen = [[name] for name in self.linears if not any(name in names for names in seen.values())]
        return [*seen.values(), *unseen]

    def _settled(self) -> dict[str, nn.Module]:
        """The outermost submodules whose linears are all final, and final linears outside of them."""
        settled: dict[str, nn.Module] = {}
        for name, module in self.block.named_modules():
            if not name or any(name.startswith(done + ".") for done in settled):
                continue
            inside = [n for n in self.linears if n == name or n.startswith(name + ".")]
            if inside and self._final.issuperset(inside):
                settled[name] = module
        return settled

    @contextmanager
    def _shortcuts(self, batch: int) -> Iterator[None]:
        """Skip what is settled and known for this batch, and remember what is settled and new."""
        if self._repeated:
            yield
            return
        outputs, settled = self._outputs[batch], self._settled()
        known = {name: self.block.get_submodule(name) for name in outputs}
        with remembered({**settled, **known}, outputs, lambda _name: self._held < self._memory):
            yield
        for name in outputs:
            if any(name.startswith(outer + ".") for outer in outputs):
                outputs.forget(name)  # an outer module has run since and stands for it
        self._held = sum(memory.nbytes for memory in self._outputs)

    @torch.no_grad()
    def observe(self, statistics: Mapping[str, Statistics]) -> None:
        """Feed the inputs of these linears, over all batches, to their statistics; run no further."""
        modules = {name: self.linears[name] for name in statistics}
        for batch, (call, hidden) in enumerate(zip(self.calls, self.hidden, strict=True)):
            stop = not self._repeated
            with self._shortcuts(batch), suppress(Enough), observe(modules, statistics, stop_after=stop):
                call.run(self.block, hidden)

    def finish(self, names: Iterable[str]) -> None:
        """The weights of these linears will not change any more."""
        self._final.update(names)

    @torch.no_grad()
    def outputs(self) -> list[torch.Tensor]:
        """The block's hidden states, per batch, with the weights as they are now."""
        results = []
        for batch, (call, hidden) in enumerate(zip(self.calls, self.hidden, strict=True)):
            with self._shortcuts(batch):
                results.append(call.run(self.block, hidden))
            self._outputs[batch] = Memory()
        return results

    @torch.no_grad()
    def sample(self, name: str, batches: int = 1) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of a submodule in the first batches, for replaying it alone."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        module = self.block.get_submodule(name)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))
            raise Enough

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for call, hidden in list(zip(self.calls, self.hidden, strict=True))[:batches]:
                with suppress(Enough):
                    call.run(self.block, hidden)
        finally:
            handle.remove()
        return found


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, AttributeError, OSError):  # not on this system
        return 2**31
