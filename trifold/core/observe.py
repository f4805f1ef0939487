"""Watching the inputs of linears, and running no more of a block than a question needs.

Hooks and replaced forwards live inside the `with` and are gone after it, also when it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trifold.core.statistics import Observation, Statistic


class Enough(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside a forward pass once everything that was asked for has been seen."""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The input of a module call, positional or by keyword."""
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))


@contextmanager
def watch(modules: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` with the input x (..., in) of each module, just before it runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: see(name, first_tensor(args, kwargs))

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe(modules: Mapping[str, nn.Module], statistics: Mapping[str, Iterable[Statistic]]) -> Iterator[None]:
    """Feed every call's input to the statistics of that name."""

    def see(name: str, x: torch.Tensor) -> None:
        for statistic in statistics[name]:
            statistic.update(Observation(x.reshape(-1, x.shape[-1])))

    with watch({name: modules[name] for name in statistics}, see):
        yield


class Memory:
    """Outputs of modules, held without copying: one that was changed in place since is forgotten.

    nbytes: of the tensors that are held.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._held: dict[str, tuple[Any, list[int]]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held))

    def __contains__(self, name: str) -> bool:
        if name in self._held:
            value, versions = self._held[name]
            if versions == [t._version for t in _tensors(value)]:
                return True
            self.forget(name)
        return False

    def __getitem__(self, name: str) -> Any:
        return self._held[name][0]

    def keep(self, name: str, value: Any) -> None:
        """Hold an output, if it is made of tensors alone, whose changes can be noticed."""
        if _watchable(value):
            self.forget(name)
            self._held[name] = value, [t._version for t in _tensors(value)]
            self.nbytes += _nbytes(value)

    def forget(self, name: str) -> None:
        """Let go of an output."""
        if name in self._held:
            self.nbytes -= _nbytes(self._held.pop(name)[0])


@contextmanager
def remembered(modules: Mapping[str, nn.Module], memory: Memory, keep: Callable[[str], bool]) -> Iterator[None]:
    """Replace each module's forward: return what memory holds, else run and, if `keep(name)`, hold it.

    For modules whose weights and inputs are final, so that running them again gives the same.
    """

    def replacement(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in memory:
                return memory[name]
            result = forward(*args, **kwargs)
            if keep(name):
                memory.keep(name, result)
            return result

        return run

    own: dict[str, Any] = {name: vars(module).get("forward") for name, module in modules.items()}  # set by others
    for name, module in modules.items():
        module.forward = replacement(name, module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]


def _watchable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list) and all(_watchable(v) for v in value)
    return value is None or isinstance(value, torch.Tensor)


def _nbytes(value: Any) -> int:
    return sum(t.nbytes for t in _tensors(value))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []
