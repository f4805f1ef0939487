"""Layers that are given the same tensor, such as q, k and v, or gate and up, computed by one call of the first.

Their right factors, or whole weights, are then one product, x -> [x Vq | x Vk | x Vv], and threads wake once. Which
layers these are is seen, not told: those beside each other that one tensor goes to. What a member does not come for is
dropped, and it is computed apart from then on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trifold.kernels.native.stages import bind
from trifold.kernels.staged import Staged

if TYPE_CHECKING:
    from trifold.kernels.packed_linear import PackedLinear


class SharedInput:
    """One for linears of one module with as many input features. A copy has yet to see which belong together.

    A tensor changed between two members through `.data` or NumPy, which torch does not count, is taken for the old one.
    """

    def __init__(self) -> None:
        self._together: weakref.WeakKeyDictionary[PackedLinear, _Together] = weakref.WeakKeyDictionary()
        self._apart: weakref.WeakSet[PackedLinear] = weakref.WeakSet()
        self._seen = _Seen()

    def output(self, module: PackedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """`module`'s output for x (..., in), if others are computed with it; else None."""
        seen = self._seen
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        if seen.input is None or seen.input() is not x or seen.version != x._version:
            if x.device.type != "cpu" or type(x) is not torch.Tensor or torch.is_inference_mode_enabled():
                return None  # or what is kept would be inference tensors
            if x.is_inference() or not x.numel():
                return None  # changes of an inference tensor are not counted
            self._learn(seen)
            seen.input, seen.version, seen.modules = weakref.ref(x), x._version, [weakref.ref(module)]
            known = self._together.get(module)
            seen.outputs = {} if known is None else known.outputs(x)
        elif module not in seen.outputs and (own := weakref.ref(module)) not in seen.modules:
            seen.modules.append(own)
        y = seen.outputs.pop(module, None)
        return None if y is None or _watched(module) else y

    def forget(self) -> None:
        """Nothing that was bound to runtime tensors, or computed with them, outlives them."""
        for known in list(self._together.values()):
            known.forget()
        self._seen.outputs = {}

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


class _Bound(NamedTuple):
    """A call of all members, as long as these are their stages. call: None if there is none."""

    stages: list[Staged | None]
    call: Any = None
    most: int = 0

    def holds(self, members: int) -> bool:
        return len(self.stages) == members and all(stage is None or stage.holds() for stage in self.stages)


class _Together:
    """Members that are computed by one call, bound for a dtype when it first comes."""

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self._bound: dict[torch.dtype, _Bound] = {}

    def forget(self) -> None:
        self._bound.clear()

    def members(self) -> list[PackedLinear]:
        return [member for ref in self._members if (member := ref()) is not None]

    def outputs(self, x: torch.Tensor) -> dict[PackedLinear, torch.Tensor]:
        """Of every member; empty if there is no call for all of them."""
        lead, features, members = x.shape[:-1], x.shape[-1], self.members()
        if len(members) < 2 or features != members[0].in_features or any(map(_watched, members)):
            return {}
        bound = self._bound.get(x.dtype)
        if bound is None or not bound.holds(len(members)):
            bound = self._bound[x.dtype] = _bind([member.stages(x.dtype) for member in members])
        if bound.call is None or lead.numel() > bound.most:
            return {}
        biases = [None if (bias := m._parameters["bias"]) is None else bias.detach().to(x.dtype) for m in members]
        ys = bound.call(x.reshape(-1, features).contiguous(), biases)
        return {m: y.view(*lead, y.shape[1]) for m, y in zip(members, ys, strict=True)}


def _bind(stages: list[Staged | None]) -> _Bound:
    found = [stage for stage in stages if stage is not None]
    if len(found) < len(stages) or len({stage.variant for stage in found}) > 1:
        return _Bound(stages)
    call = bind([stage.layer for stage in found], found[0].variant)
    return _Bound(stages, call, min(stage.most for stage in found))


def _watched(module: PackedLinear) -> bool:
    """Whether something has to happen when this module itself is called."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    bias = module._parameters["bias"]
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()
