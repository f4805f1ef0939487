"""What every block is called with: one cheap forward per batch, with stubs in place of the blocks.

Blocks of one model may be called with different masks, rotary tables or extra inputs, so each one's own
arguments are recorded; nothing is traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trifold.core.errors import InputError


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    pass


@dataclass(frozen=True)
class Call:
    """Arguments of one block call, hidden states excluded (the first positional, or by keyword).

    skipped: the decoder leaves the block out, as it does with cross-attention where there is no image.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool
    skipped: bool = False

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's hidden states for these inputs."""
        if self.skipped:
            return hidden
        if self.positional:
            out = block(hidden, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        return out[0] if isinstance(out, tuple | list) else out


def own_state(calls: list[Call]) -> list[Call]:
    """The same calls with mappings of their own, for a second stream over the same batch.

    Some decoders pass one dict to all blocks, in which early blocks leave keys and values for later ones.
    """
    copies: dict[int, dict[Any, Any]] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), dict(value)) if isinstance(value, dict) else value

    return [replace(c, args=tuple(map(own, c.args)), kwargs={k: own(v) for k, v in c.kwargs.items()}) for c in calls]


Seen = list[tuple[int, torch.Tensor, Call]]


class _Stub(nn.Module):
    def __init__(self, block: nn.Module, seen: Seen, index: int, last: bool, arity: int):
        super().__init__()
        object.__setattr__(self, "_block", block)
        self.seen, self.index, self.last, self.arity = seen, index, last, arity

    def __getattr__(self, name: str) -> Any:  # decoder loops read attributes such as the attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
        self.seen.append((self.index, hidden, Call(args[1:], rest, bool(args))))
        if self.last:
            raise _Stop
        return self.returned(hidden)

    def returned(self, hidden: torch.Tensor) -> Any:
        return (hidden, *[None] * (self.arity - 1)) if self.arity else hidden


@dataclass(frozen=True)
class Captured:
    """hidden: states that enter block 0, (batch, seq, hidden). calls: of every block. arity: length of the
    tuples that the decoder expects its blocks to return, 0 if it expects a tensor."""

    hidden: torch.Tensor
    calls: list[Call]
    arity: int


@torch.no_grad()
def capture_calls(model: Any, blocks: nn.ModuleList, ids: torch.Tensor) -> Captured:
    """Record what every block is called with for ids (batch, seq) int64. Blocks may be on the meta device.

    Raises InputError if the decoder does not call its blocks one after the other, each on what the one before
    it returns, or if it changes their weights.
    """
    real = list(blocks)
    written = [p._version for p in blocks.parameters()]
    problem: Exception | None = None
    for arity in range(4):  # what blocks return is found out, not declared
        seen: Seen = []
        problem = None
        for i, block in enumerate(real):
            blocks[i] = _Stub(block, seen, i, i == len(real) - 1, arity)
        try:
            model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        except (MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problem = error
        finally:
            for i, block in enumerate(real):
                blocks[i] = block
        if written != [p._version for p in blocks.parameters()]:
            raise InputError(f"{type(model).__name__}: it changes the weights of its blocks when it runs")
        order = [index for index, _, _ in seen]
        if problem is None and (not order or order != sorted(set(order))):
            problem = ValueError(f"called in the order {order}")
        if problem is None:
            if all(hidden is seen[0][1] or torch.equal(hidden, seen[0][1]) for _, hidden, _ in seen):
                calls = {index: call for index, _, call in seen}
                missing = Call((), {}, True, skipped=True)
                return Captured(seen[0][1], [calls.get(index, missing) for index in range(len(real))], arity)
            if all(hidden.shape == seen[0][1].shape for _, hidden, _ in seen):
                raise InputError(f"{type(model).__name__}: hidden states are changed between its blocks")
    raise InputError(f"{type(model).__name__}: its blocks cannot be run one by one ({problem!r})")


class _Inject(_Stub):
    """Passes the given hidden states on in place of a block's own."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, arity: int):
        super().__init__(block, [], 0, False, arity)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned(self.hidden)


class Tail(nn.Module):
    """Everything behind the blocks, as a module: hidden states of the last block -> logits.

    It shares the model's submodules under their own names.
    """

    def __init__(self, model: Any, blocks: nn.ModuleList, arity: int) -> None:
        super().__init__()
        self._modules = model._modules
        object.__setattr__(self, "_owner", (model, blocks, arity))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        model, blocks, arity = object.__getattribute__(self, "_owner")
        real = list(blocks)
        for i, block in enumerate(real):
            blocks[i] = _Inject(block, hidden, arity)
        try:
            return model(input_ids=ids, use_cache=False).logits
        finally:
            for i, block in enumerate(real):
                blocks[i] = block
