"""Running one block over the calibration batches in stages, without running anything needlessly twice.

Linears that see the same input form a stage. A stage's inputs are observed with everything before it already
compressed; then its own weights become final. What is final is not run again: the outputs of finished
submodules are remembered, and a submodule that ends with a linear (attention, MLP) is finished by that linear
alone, on the input that was observed. So the sequential protocol costs little more than one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trifold.compress.capture import Call
from trifold.compress.memory import free_bytes
from trifold.compress.processes import ALONE, Processes
from trifold.compress.scratch import Release, keep
from trifold.core.method import Statistics
from trifold.core.observe import Enough, Memory, remembered, watch
from trifold.core.statistics import Observation
from trifold.kernels import PackedExperts

MEMORY_SHARE = 0.25  # of the memory free at the start of a block may hold remembered tensors


class BlockRunner:
    """One block, its calls and the hidden states that enter it: (batch, seq, hidden) per batch.

    stages: names of linears that share an input, in order of execution; the first leads. waves: stages that do
    not depend on each other, such as the first linears of all experts, so that one pass can observe them all.
    bypassed: linears whose parent ran without calling them (it reads their weight itself), so that they have to
    stay dense. memory: bytes of remembered tensors. release: told of each batch's hidden states after their use.
    processes: with which others batches are shared.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        calls: Sequence[Call],
        hidden: list[torch.Tensor],
        memory: int | None = None,
        release: Release = keep,
        processes: Processes = ALONE,
    ) -> None:
        self.block, self.linears, self.calls, self.hidden = block, dict(linears), calls, hidden
        self.release, self._memory = release, memory
        self.device = next((p.device for p in block.parameters()), hidden[0].device)
        self._final: set[str] = set()
        self._outputs = [Memory() for _ in hidden]
        self._inputs = [Memory() for _ in hidden]
        self._budget = free_bytes() * MEMORY_SHARE if memory is None else memory
        self._held = 0
        self._plainly = False  # run everything each time: what a linear sees cannot be told from one forward
        self._endings: dict[str, tuple[str, Any]] = {}
        self.processes = processes
        self.waves = self._agreed(self._probe())
        self.stages = [stage for wave in self.waves for stage in wave]

    def anew(self, linears: Mapping[str, nn.Module]) -> BlockRunner:
        """For the same block and hidden states, after the block was changed or for some of its linears."""
        return BlockRunner(self.block, linears, self.calls, self.hidden, self._memory, self.release, self.processes)

    @torch.no_grad()
    def _probe(self) -> list[list[list[str]]]:
        """One forward that finds the waves of stages, and which submodules end with which linear."""
        stages: dict[tuple[Any, ...], list[str]] = {}
        alive: list[torch.Tensor] = []  # so that no address is used twice
        produced: dict[tuple[Any, ...], str] = {}
        ran: set[str] = set()

        def see(name: str, x: torch.Tensor) -> None:
            if any(name in names for names in stages.values()):
                self._plainly = True
                return
            alive.append(x)
            stages.setdefault(_identity(x), []).append(name)

        def returned(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                ran.add(name)
                first, *rest = output if isinstance(output, tuple) and output else (output,)
                if not isinstance(first, torch.Tensor) or any(value is not None for value in rest):
                    return
                alive.append(first)
                key = _identity(first)
                if name in self.linears:
                    produced[key] = name
                elif name and produced.get(key, "").startswith(name + "."):
                    self._endings[name] = produced[key], output

            return hook

        with ExitStack() as stack:
            for name, module in self.block.named_modules():
                if not name or any(n == name or n.startswith(name + ".") for n in self.linears):
                    stack.callback(module.register_forward_hook(returned(name)).remove)
            with watch(self.linears, see):
                self.calls[0].run(self.block, self.states(0))
        self._endings = {name: (linear, _like(output)) for name, (linear, output) in self._endings.items()}
        unseen = [name for name in self.linears if not any(name in names for names in stages.values())]
        self.bypassed = [name for name in unseen if name.rpartition(".")[0] in ran]
        for name in self.bypassed:
            del self.linears[name]
        waves: dict[str, list[list[str]]] = {}
        for stage in stages.values():
            waves.setdefault(self._place(stage[0]), []).append(stage)
        for name in unseen:
            if name in self.bypassed:
                continue
            self._plainly |= self._place(name) not in waves  # a sibling shows when it runs
            waves.setdefault(self._place(name), []).append([name])
        return list(waves.values())

    def _agreed(self, waves: list[list[list[str]]]) -> list[list[list[str]]]:
        """The waves that the first process found, on its text."""
        if self.processes.size == 1:
            return waves
        found, bypassed = self.processes.same((waves, self.bypassed))
        self._plainly |= found != waves or bypassed != self.bypassed
        for name in self.bypassed:
            self.linears[name] = self.block.get_submodule(name)
        self.bypassed = bypassed
        for name in bypassed:
            del self.linears[name]
        return found

    def _place(self, name: str) -> str:
        """The name without the number of a sibling: modules of a list, such as experts, run side by side."""
        parts = name.split(".")
        for i in range(1, len(parts)):
            if isinstance(self.block.get_submodule(".".join(parts[:i])), nn.ModuleList | PackedExperts):
                parts[i] = "*"
                break
        return ".".join(parts)

    @cached_property
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

    def states(self, batch: int) -> torch.Tensor:
        """The hidden states of a batch, where the block is."""
        return self.hidden[batch].to(self.device)

    @contextmanager
    def _shortcuts(self, batch: int) -> Iterator[None]:
        """Skip what is settled and known for this batch, and remember what is settled and new."""
        if self._plainly:
            yield
            return
        outputs, inputs, settled = self._outputs[batch], self._inputs[batch], self._settled
        for name in settled:
            linear, build = self._endings.get(name, ("", None))
            if name not in outputs and linear in inputs:
                outputs.keep(name, build(self.linears[linear](inputs[linear])))
        known = {name: self.block.get_submodule(name) for name in outputs}
        with remembered({**settled, **known}, outputs, self._worth_keeping):
            yield
        for name in outputs:
            if any(name.startswith(outer + ".") for outer in outputs):
                outputs.forget(name)  # an outer module has run since and stands for it
        for name in inputs:
            if any(name.startswith(outer + ".") for outer in outputs):
                inputs.forget(name)
        self._held = sum(memory.nbytes for memory in (*self._outputs, *self._inputs))

    def _worth_keeping(self, name: str) -> bool:
        ended = any(name.startswith(outer + ".") for outer in self._endings)  # its ending will stand for it
        return not ended and self._held < self._budget

    @torch.no_grad()
    def inputs(self, batch: int, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """What these linears see in one batch, (tokens, in) per call; the rest of the block is not run."""
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        ends = {linear for linear, _ in self._endings.values()}

        def see(name: str, x: torch.Tensor) -> None:
            seen[name].append(x.reshape(-1, x.shape[-1]))
            wide = x.shape[-1] > self.hidden[batch].shape[-1]  # an MLP's inside: cheaper to make again than to keep
            if name in ends and not wide and self._held < self._budget:
                self._inputs[batch].keep(name, x)
            if all(seen.values()) and not self._plainly:
                raise Enough

        watching = watch({name: self.linears[name] for name in names}, see)
        with self._shortcuts(batch), suppress(Enough), watching:
            self.calls[batch].run(self.block, self.states(batch))
        return seen

    def observe(self, statistics: Mapping[str, Statistics], dense: BlockRunner | None = None) -> None:
        """Feed the inputs of these linears, over all batches, to their statistics.

        dense: the same block before compression, on the dense model's hidden states, for statistics that
        compare the two.
        """
        names = list(statistics)
        for batch in range(len(self.hidden)):
            seen = self.inputs(batch, names)
            beside = dense.inputs(batch, names) if dense is not None else None
            for name, accumulators in statistics.items():
                for call, x in enumerate(seen[name]):
                    x_dense = None if beside is None else _beside(beside[name], call, x, self.hidden[batch])
                    observation = Observation(x, x_dense)
                    for statistic in accumulators:
                        statistic.update(observation)
            for runner in filter(None, (self, dense)):
                runner.release(runner.hidden[batch])
        for accumulators in statistics.values():
            self.processes.reduce(accumulators)

    def finish(self, names: Iterable[str]) -> None:
        """The weights of these linears will not change any more."""
        self._final.update(names)
        self.__dict__.pop("_settled", None)

    def forget(self) -> None:
        """Remember nothing: final weights are about to change after all."""
        self._outputs = [Memory() for _ in self.hidden]
        self._inputs = [Memory() for _ in self.hidden]
        self._held = 0

    @torch.no_grad()
    def advance(self) -> list[torch.Tensor]:
        """Replace each batch's hidden states by what the block, with its weights as they are now, makes of them.

        The first batch, a small one, is also run without what was remembered; should a block be so made that
        the two differ, nothing remembered is used.
        """
        plain = self.calls[0].run(self.block, self.states(0))
        for batch, call in enumerate(self.calls):
            with self._shortcuts(batch):
                after = call.run(self.block, self.states(batch))
            self._plainly |= not batch and not torch.equal(after, plain)
            self._replace(batch, after if batch else plain)
            self._outputs[batch], self._inputs[batch] = Memory(), Memory()
        return self.hidden

    def _replace(self, batch: int, after: torch.Tensor) -> None:
        """In place, where the block keeps shape and dtype: states of all batches lie in one piece of memory."""
        held = self.hidden[batch]
        if held.shape == after.shape and held.dtype == after.dtype:
            held.copy_(after)
            self.release(held)
        else:
            self.hidden[batch] = after

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
            for batch, call in enumerate(self.calls[:batches]):
                with suppress(Enough):
                    call.run(self.block, self.states(batch))
        finally:
            handle.remove()
        return found


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two names for the same values have in common."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version


def _beside(dense: list[torch.Tensor], call: int, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The same tokens in the dense stream; where routing chooses tokens, they cannot be paired: no drift."""
    routed = len(x) != hidden[..., 0].numel()
    return x if routed or call >= len(dense) or dense[call].shape != x.shape else dense[call]


def _like(output: Any) -> Any:
    """A function that puts a tensor where `output` has its own."""
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda tensor: (tensor, *rest)
    return lambda tensor: tensor
