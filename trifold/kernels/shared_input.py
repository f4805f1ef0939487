"""Layers that are given the same tensor, such as q, k and v, or gate and up, computed by one call of the first.

Their right factors, or whole weights, are then one product, x -> [x Vq | x Vk | x Vv], and threads wake once. Which
layers these are is seen, not told: those beside each other that one tensor goes to. What a member does not come for is
dropped, and it is computed apart from then on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trifold.kernels.native.stages import bind
from trifold.kernels.staged import Staged

if TYPE_CHECKING:
    from trifold.kernels.packed_linear import PackedLinear


class SharedInput:
    """One for linears of one module with as many input features. A copy has yet to see which belong together."""

    def __init__(self) -> None:
        self._together: weakref.WeakKeyDictionary[PackedLinear, _Together] = weakref.WeakKeyDictionary()
        self._apart: weakref.WeakSet[PackedLinear] = weakref.WeakSet()
        self._seen = _Seen()

    def output(self, module: PackedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """`module`'s output for x (..., in), if others are computed with it; else None. Nobody wants gradients."""
        seen = self._seen
        if seen.input is None or seen.input() is not x or seen.version != x._version:
            self._learn(seen)
            seen.input, seen.version, seen.modules = weakref.ref(x), x._version, [weakref.ref(module)]
            known = self._together.get(module)
            seen.outputs = {} if known is None else known.outputs(x)
        elif module not in seen.outputs:
            seen.modules.append(weakref.ref(module))
        return seen.outputs.pop(module, None)

    def _learn(self, seen: _Seen) -> None:
        """What the last tensor told."""
        self._apart.update(seen.outputs)
        modules = [m for ref in seen.modules if (m := ref()) is not None and m not in self._apart]
        if seen.outputs:
            for first, known in list(self._together.items()):
                self._together[first] = _Together([m for m in known.members() if m not in self._apart])
        elif len(modules) > 1 and modules[0] not in self._together:
            self._together[modules[0]] = _Together(modules)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedInput, ()


class _Seen(threading.local):
    """The last tensor that came, in this thread, the modules that it came to, and outputs that were not fetched."""

    input: weakref.ref[torch.Tensor] | None = None
    version = 0

    def __init__(self) -> None:
        self.modules: list[weakref.ref[PackedLinear]] = []
        self.outputs: dict[PackedLinear, torch.Tensor] = {}


class _Together:
    """Members that are computed by one call, bound for a dtype when it first comes."""

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self._calls: dict[torch.dtype, tuple[list[Staged | None], Any]] = {}

    def members(self) -> list[PackedLinear]:
        return [member for ref in self._members if (member := ref()) is not None]

    def outputs(self, x: torch.Tensor) -> dict[PackedLinear, torch.Tensor]:
        """Of every member; empty if there is no call for all of them."""
        members = self.members()
        if len(members) < 2 or any(map(_watched, members)):
            return {}
        stages = [member.stages(x.dtype) for member in members]
        known = self._calls.get(x.dtype)
        if known is None or any(a is not b for a, b in zip(known[0], stages, strict=True)):
            found = [stage for stage in stages if stage is not None]
            one = len(found) == len(stages) and len({stage.variant for stage in found}) == 1
            known = stages, bind([stage.layer for stage in found], found[0].variant) if one else None
            self._calls[x.dtype] = known
        rows = x.reshape(-1, x.shape[-1])
        if known[1] is None or len(rows) > min(stage.most for stage in stages if stage is not None):
            return {}
        biases = [None if m.bias is None else m.bias.detach().to(x.dtype) for m in members]
        ys = known[1](rows.contiguous(), biases)
        return {m: y.view(*x.shape[:-1], m.out_features) for m, y in zip(members, ys, strict=True)}


def _watched(module: PackedLinear) -> bool:
    """Whether something has to happen when this module itself is called."""
    learns = torch.is_grad_enabled() and module.bias is not None and module.bias.requires_grad
    return bool(learns or module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
