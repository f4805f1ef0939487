"""One table of named things: methods and formats find their way into recipes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from trifold.core.errors import RecipeError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> things of one kind, filled by decorators at import."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make the thing known as `name`. Raises ValueError if the name is taken."""

        def add(thing: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = thing
            return thing

        return add

    def get(self, name: str) -> T:
        """The thing called `name`; RecipeError with the nearest names if there is none."""
        if name not in self._entries:
            raise RecipeError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
