"""`--set KEY=VALUE`: which fields of a recipe a key stands for, and what a changed option takes the place of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trifold.core.errors import RecipeError, unknown_name
from trifold.core.method import METHODS


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Put a value into every place of a recipe's mapping that the key names. Raises RecipeError if there is none."""
    owner, dot, field = key.rpartition(".")
    if owner == "input" or owner.endswith(".input"):
        owner, dot, _ = owner.rpartition("input")[0].rpartition(".")
        field = f"input.{field}"
    owners = _fields(data)
    places = [place for name, place in owners.get(field, ()) if not dot or owner == name]
    if not places:
        known = {f"{o}.{f}" if owner else f for f, held in owners.items() for o, _ in held}
        raise RecipeError(f"--set {key}: {unknown_name('setting', key, known)}")
    for place in places:
        listed = field in ("targets", "ignore") and not isinstance(value, list)
        place[field.removeprefix("input.")] = [value] if listed else value
    for step in data["steps"]:
        if any(place is step["options"] for place in places):
            step["options"] = changed(step["method"], step["options"], {field: value})


def changed(method: str, options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options with some of them changed, without those that the changed ones take the place of."""
    instead = METHODS.get(method).instead
    gone = {instead.get(option) for option, value in changes.items() if value is not None} - set(changes)
    return {**{option: None if option in gone else value for option, value in options.items()}, **changes}


def _fields(data: dict[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Field -> [(owner, mapping that holds it)], with owners named as `--set OWNER.k=v` does."""
    owners: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for field in ("nsamples", "seqlen", "seed", "true_sequential", "min_expert_tokens"):
        owners.setdefault(field, []).append(("recipe", data))
    for step in data["steps"]:
        for part in ("scheme", "options"):
            for field in step[part] or {}:
                owners.setdefault(field, []).append((step["name"], step[part]))
        for field in step["input"] or {}:
            owners.setdefault(f"input.{field}", []).append((step["name"], step["input"]))
        for field in ("targets", "ignore"):
            owners.setdefault(field, []).append((step["name"], step))
    return owners
