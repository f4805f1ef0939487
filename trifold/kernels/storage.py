"""The tensors of a packed weight inside a module.

At rest a module holds the tensors of its format, under their names on disk. An op may replace them by a
runtime layout of its own; whatever looks at them by name, moves, copies or loads them gets the portable ones
back first, so the two are never both in memory and never disagree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from trifold.core.canonical import Canonical
from trifold.core.errors import CheckpointError
from trifold.formats.base import Spec, layout, unpack
from trifold.kernels.op import Runtime, Tensors
from trifold.kernels.pages import page_out

_SWITCH = threading.RLock()


class PackedModule(nn.Module):
    """Base of the modules that run on packed weights.

    The portable tensors are buffers, empty until loaded. Casting a module never changes their dtypes: codes
    are bits, and scales were rounded before the codes were chosen. The parts of a nested weight are modules of
    their own, in `parts`.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self._layout = {name: entry for name, entry in layout(spec).items() if "." not in name}
        self._runtime: Tensors = {}
        self._holder: Runtime | None = None
        self._bound: Any = None  # a call of the holder on the runtime tensors, while there are any
        self._shared: Any = None
        for name, (shape, dtype) in self._layout.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        if spec.get("parts"):
            self.parts = nn.ModuleList(self._part(part) for part in spec["parts"])

    def _part(self, spec: Spec) -> PackedModule:
        """A module for a part of a nested weight."""
        return PackedModule(spec)

    def portable(self) -> Tensors:
        """The tensors as on disk, by name relative to the module. Runtime layouts are given up for them.

        Raises CheckpointError if one of them has not the shape and dtype that the spec says.
        """
        tensors = self._own()
        for number, part in enumerate(getattr(self, "parts", ())):
            tensors.update({f"parts.{number}.{name}": tensor for name, tensor in part.portable().items()})
        return tensors

    def _own(self) -> Tensors:
        """The same, without those of parts."""
        self._restore()
        tensors = {name: self.get_buffer(name) for name in self._layout}
        for name, (shape, dtype) in self._layout.items():
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                raise CheckpointError(
                    f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, its spec says "
                    f"{dtype} {shape}; load the tensors that belong to this spec"
                )
        return tensors

    def canonical(self) -> Canonical:
        """The weight as its method decided it, with what is done to its input."""
        return unpack(self.portable(), self.spec)

    def dequantize(self) -> torch.Tensor:
        """The weight, (out, in) float32."""
        return self.canonical().dequantize()

    def _tensors_for(self, op: Runtime) -> Tensors:
        """What `op` runs on, of the module's own tensors."""
        if self._holder is op:
            return self._runtime
        with _SWITCH:
            if self._holder is op:
                return self._runtime
            tensors = self._own()
            if op.replaces:
                with torch.inference_mode(False), torch.no_grad():
                    portable, tensors = tensors, op.prepare(tensors, self.spec)
                for tensor in portable.values():
                    page_out(tensor)
                self._replace(self._layout, {f"runtime_{name}": t for name, t in tensors.items()}, False)
                self._runtime, self._holder = tensors, op
            return tensors

    def hold(self, op: Runtime) -> Tensors:
        """The tensors that `op` runs on; if it has a layout of its own, they replace the portable ones."""
        return self._tensors_for(op)

    def holding(self, tensors: Tensors) -> bool:
        """Whether `tensors` are those that `hold` returned, and were not given up for the portable ones since."""
        return self._runtime is tensors

    def share(self, tensors: Tensors, owner: object) -> None:
        """Go on with `tensors`, the same as those held, which `owner` made views of something larger."""
        with _SWITCH:
            self._replace(
                [f"runtime_{n}" for n in self._runtime], {f"runtime_{n}": t for n, t in tensors.items()}, False
            )
            self._runtime, self._shared, self._bound = tensors, owner, None

    @property
    def shared(self) -> object:
        """Who made views of the tensors that are held; None if nobody did."""
        return self._shared

    def _restore(self) -> None:
        if self.__dict__.get("_holder") is None:
            return
        with _SWITCH:
            op, runtime = self._holder, self._runtime
            if op is None:
                return
            with torch.inference_mode(False), torch.no_grad():
                tensors = op.restore(runtime, self.spec)
            self._runtime, self._holder, self._bound, self._shared = {}, None, None, None
            portable = {name: tensors[name] for name in self._layout}
            self._replace({f"runtime_{name}": None for name in runtime}, portable, True)

    def _replace(self, old: Any, new: Tensors, persistent: bool) -> None:
        for name in old:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name, tensor in new.items():
            self.register_buffer(name, tensor, persistent=persistent)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_layout", ()):
            self._restore()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_layout", ()):
            self._restore()
            if isinstance(value, nn.Parameter):  # some loaders wrap whatever they set
                value = value.data
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        self._restore()
        return {**self.__dict__, "_buffers": dict(self._buffers)}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._restore()
        tensors = {name: self.get_buffer(name) for name in self._layout}
        for name in tensors:
            del self._buffers[name]
        super()._apply(fn, recurse)
        for name, tensor in tensors.items():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.spec.items() if name != "parts")
