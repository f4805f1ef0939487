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
def observe(
    modules: Mapping[str, nn.Module], statistics: Mapping[str, Iterable[Statistic]], stop_after: bool = False
) -> Iterator[None]:
    """Feed every call's input to the statistics of that name; with `stop_after`, raise `Enough` once all
    names were seen, so that the rest of the block need not run."""
    waiting: set[str] = set(statistics)

    def see(name: str, x: torch.Tensor) -> None:
        observation = Observation(x.reshape(-1, x.shape[-1]))
        for statistic in statistics[name]:
            statistic.update(observation)
        waiting.discard(name)
        if stop_after and not waiting:
            raise Enough

    with watch({name: modules[name] for name in statistics}, see):
        yield


@contextmanager
def remembered(
    modules: Mapping[str, nn.Module], outputs: dict[str, Any], keep: Callable[[str], bool]
) -> Iterator[None]:
    """Replace each module's forward: return `outputs[name]` where known, else run and, if `keep(name)`, store.

    For modules whose weights and inputs are final, so that running them again gives the same. What is stored
    is handed out as a copy, since a block may add to it in place.
    """

    def replacement(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in outputs:
                return _copy(outputs[name])
            result = forward(*args, **kwargs)
            if keep(name):
                outputs[name] = _copy(result)
            return result

        return run

    for name, module in modules.items():
        module.forward = replacement(name, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(_copy(v) for v in value) if type(value) in (tuple, list) else value
