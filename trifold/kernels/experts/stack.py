"""The runtime tensors of packed linears in one piece of memory, of which each linear has a view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trifold.kernels.dispatch import resolve_experts
from trifold.kernels.experts.op import ExpertsOp
from trifold.kernels.experts.routing import Routing
from trifold.kernels.op import Op, Tensors
from trifold.kernels.packed_linear import PackedLinear


class Stack:
    """Linears of one spec, in the layout of one op, side by side; their tensors are views afterwards.

    It does not hold the tensors, the linears do: once they have gone back to the portable ones, it is no longer
    `of` them, and nothing of it stays in memory.
    """

    def __init__(self, linears: Sequence[PackedLinear], op: Op) -> None:
        self.op, self.linears = op, tuple(linears)
        with torch.inference_mode(False), torch.no_grad():
            held = linears[0].hold(op)
            whole = {name: t.new_empty(len(linears), *t.shape) for name, t in held.items()}
            for e, linear in enumerate(linears):
                for name, tensor in linear.hold(op).items():
                    whole[name][e].copy_(tensor)
                linear.share({name: t[e] for name, t in whole.items()}, self)

    def of(self, linears: Sequence[nn.Module], op: Op) -> bool:
        """Whether these are its linears, and still hold its tensors."""
        if self.op is not op or len(linears) != len(self.linears):
            return False
        return all(linear is mine and mine.shared is self for linear, mine in zip(linears, self.linears, strict=True))

    def run(self, op: ExpertsOp, x: torch.Tensor, routing: Routing, weight: torch.Tensor | None) -> torch.Tensor:
        """x, rows as the routing says, or one for k slots -> (slots, out)."""
        return op.run(x, routing, weight, self.tensors(), self.linears[0].spec, self.bias())

    def tensors(self) -> Tensors:
        """The tensors with a first dimension of linears."""
        return {name: self._whole(tensor) for name, tensor in self.linears[0].hold(self.op).items()}

    def bias(self) -> torch.Tensor | None:
        """(linears, out), or None."""
        biases = [linear.bias.detach() for linear in self.linears if linear.bias is not None]
        return torch.stack(biases) if biases else None

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided((len(self.linears), *tensor.shape), (tensor.numel(), *tensor.stride()))


def together(linears: Sequence[nn.Module], x: torch.Tensor, slots: int) -> tuple[Stack, ExpertsOp] | None:
    """How to run x through all linears at once; None if there is no op for it, or if they are not all alike."""
    first = linears[0]
    if not isinstance(first, PackedLinear) or "parts" in first.spec:
        return None
    one = first.op(x)
    op, _ = resolve_experts(one.name, first.spec, len(linears), slots)
    if op is None:
        return None
    stack = first.shared
    if not (isinstance(stack, Stack) and stack.of(linears, one)):
        packed = [linear for linear in linears if isinstance(linear, PackedLinear) and _alike(linear, first)]
        if len(packed) < len(linears):
            return None
        stack = Stack(packed, one)
    return stack, op


def _alike(one: PackedLinear, other: PackedLinear) -> bool:
    return one.spec == other.spec and (one.bias is None) == (other.bias is None)
