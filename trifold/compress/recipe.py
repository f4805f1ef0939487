"""Recipes: what to do to which layers. Validated models <-> YAML, preset names."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

import trifold.lowrank
import trifold.quantizers
import trifold.sparsity
import trifold.tuning  # noqa: F401 - all four register their methods
from trifold.compress.settings import assign, changed
from trifold.core.errors import RecipeError, unknown_name
from trifold.core.inputs import InputScheme
from trifold.core.method import METHODS, LayerMethod, Method, Tuner
from trifold.core.scheme import Scheme
from trifold.core.tables import TABLES

BLOCKS, EMBEDDINGS, HEAD = "blocks", "embeddings", "head"  # targets that every model has under some name
"""The target that means: every linear inside the decoder blocks."""


class _Loader(yaml.SafeLoader):
    """YAML without numbers to the base 60: `2:4` is a pattern, not 124."""


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(?:0b[01_]+|0[0-7_]+|0x[\da-fA-F_]+|0|[1-9][\d_]*)$"), list("-+0123456789")
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@contextmanager
def _placed() -> Iterator[None]:
    """Let pydantic add to an error the place in the recipe."""
    try:
        yield
    except RecipeError as error:
        raise ValueError(str(error)) from error


class SchemeModel(_Strict):
    """`core.scheme.Scheme` as a recipe spells it."""

    bits: StrictInt = 4
    group_size: StrictInt | StrictStr = 128
    symmetric: bool = False
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    grid: StrictStr = "int"
    zero_point: Literal["integer", "real"] = "integer"

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """A table brings its bits and has no zero-point."""
        grid = data.get("grid") if isinstance(data, Mapping) else None
        if not isinstance(grid, str) or grid not in TABLES:
            return data
        return {"bits": TABLES.get(grid).bits, **data, "symmetric": True}

    def build(self) -> Scheme:
        return Scheme(**self.model_dump())

    @model_validator(mode="after")
    def _possible(self) -> SchemeModel:
        with _placed():
            self.build()
        return self


class InputModel(_Strict):
    """`core.inputs.InputScheme` as a recipe spells it."""

    bits: StrictInt = 8
    grid: StrictStr = "int"
    static: bool = False
    full_range: bool = False

    def build(self) -> InputScheme:
        return InputScheme(**self.model_dump())

    @model_validator(mode="after")
    def _possible(self) -> InputModel:
        with _placed():
            self.build()
        return self


class Override(_Strict):
    """Other settings for the layers that match; later overrides win. `skip` leaves them dense."""

    match: str
    skip: bool = False
    scheme: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("match")
    @classmethod
    def _readable(cls, value: str) -> str:
        return _pattern(value)


class Step(_Strict):
    """One method on some layers. Patterns are shell globs on full layer names, or `re:` regular expressions."""

    method: str
    name: str = ""
    targets: tuple[str, ...] = (BLOCKS,)
    ignore: tuple[str, ...] = ()
    scheme: SchemeModel | None = None
    input: InputModel | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        with _placed():
            METHODS.get(value)
        return value

    @field_validator("targets", "ignore")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_pattern, value))

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        method = data.get("method") if isinstance(data, Mapping) else None
        options = (data.get("options") or {}) if isinstance(data, Mapping) else None
        if not isinstance(method, str) or method not in METHODS or not isinstance(options, Mapping):
            return data
        kind, full = METHODS.get(method), {**data, "name": data.get("name") or method}
        with _placed():
            full["options"] = dataclasses.asdict(build_method(method, options))  # type: ignore[call-overload]
        taken = kind.takes_scheme if issubclass(kind, LayerMethod) else "never"
        if taken == "always":
            full["scheme"] = {} if data.get("scheme") is None else data["scheme"]
        elif data.get("input") and data.get("scheme") is None and taken == "if given":
            raise ValueError(f"{method} rounds inputs only where it rounds weights; give it a `scheme`")
        elif taken == "never" and (data.get("scheme") or data.get("input")):
            raise ValueError(f"{method} takes no scheme; give it to a later step")
        return full

    @model_validator(mode="after")
    def _possible(self) -> Step:
        if self.overrides and not self.solves:
            raise ValueError(f"{self.method} takes no overrides; use `targets` and `ignore`")
        for index, override in enumerate(self.overrides):
            try:
                self.build(override.options)
                self.scheme_with(override.scheme)
            except RecipeError as error:
                raise ValueError(f"overrides.{index}: {error}") from error
        return self

    def build(self, override: Mapping[str, Any] | None = None) -> Method:
        return build_method(self.method, changed(self.method, self.options, override or {}))

    def scheme_with(self, changes: Mapping[str, Any]) -> Scheme | None:
        """The scheme with an override's changes; None if the method takes none. Raises RecipeError."""
        if self.scheme is None:
            if changes:
                raise RecipeError(f"{self.method} takes no scheme; override it in a later step")
            return None
        try:
            base = self.scheme.model_dump(exclude={"bits"} if "grid" in changes else None)
            return SchemeModel.model_validate({**base, **changes}).build()
        except ValidationError as error:
            raise RecipeError(_explain(error, SchemeModel)) from error

    @property
    def wants_text(self) -> bool:
        """Whether it cannot do without calibration text."""
        method = self.build()
        return bool(method.gathers) or isinstance(method, Tuner)

    @property
    def solves(self) -> bool:
        return issubclass(METHODS.get(self.method), LayerMethod)


class Recipe(_Strict):
    """Ordered steps, and how much calibration text they want."""

    name: str = "custom"
    steps: tuple[Step, ...] = Field(min_length=1)
    nsamples: StrictInt = Field(default=128, ge=1)
    seqlen: StrictInt = Field(default=2048, ge=2)
    true_sequential: bool = True
    min_expert_tokens: StrictInt = Field(default=128, ge=0)
    seed: StrictInt = Field(default=0, ge=0, lt=2**63)

    @field_validator("steps")
    @classmethod
    def _distinct(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        for name, count in Counter(step.name for step in steps).items():
            if count > 1:
                raise ValueError(f"{count} steps are named {name!r}; give each its own `name`")
        return steps

    @property
    def data_free(self) -> bool:
        """True if no step needs calibration text."""
        return not self.has_static_inputs and not any(step.wants_text for step in self.steps)

    @property
    def more_text(self) -> int:
        """So many times the windows of calibration some tuner wants in addition."""
        methods = [step.build() for step in self.steps]
        return max((method.more_text for method in methods if isinstance(method, Tuner)), default=0)

    @property
    def has_static_inputs(self) -> bool:
        """Whether scales of activations have to be found in calibration text."""
        return any(step.input is not None and step.input.static for step in self.steps)

    @classmethod
    def load(cls, source: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
        """A recipe from itself, a mapping, a YAML file or a preset name. Raises RecipeError."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._validated(dict(source), "recipe")
        if not isinstance(source, str | os.PathLike):
            raise RecipeError(f"a recipe is a preset name, a YAML file or a mapping, not {type(source).__name__}")
        path = Path(source)
        if path.suffix in (".yaml", ".yml") or os.path.isfile(path):
            try:
                data = yaml.load(path.read_text(), _Loader)
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise RecipeError(f"{path}: cannot be read as YAML ({_first_line(error)})") from error
            if not isinstance(data, Mapping):
                raise RecipeError(f"{path}: a recipe is a mapping with `steps`; see `trifold recipes w4a16-gptq`")
            return cls._validated({"name": path.stem, **data}, str(path))
        from trifold.compress.presets import preset

        return cls._validated(preset(str(source)), str(source))

    @classmethod
    def _validated(cls, data: Any, where: str) -> Recipe:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error, cls)}") from error

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    def updated(self, settings: Iterable[str]) -> Recipe:
        """With `k=v` in every step (or the recipe) that owns the field, `STEP.k=v` in one step; `input.k=v` for
        what is done to activations.

        Values are read as YAML; what is none, such as `*q_proj`, is taken as text.
        """
        data = self.to_dict()
        for setting in settings:
            key, sign, text = setting.partition("=")
            if not sign:
                raise RecipeError(f"--set {setting}: write it as key=value")
            try:
                value = yaml.load(text, _Loader)
            except yaml.YAMLError:
                value = text
            assign(data, key.strip(), value)
        return self._validated(data, self.name)


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method `name` with these settings. Raises RecipeError for unknown or impossible ones."""
    kind = METHODS.get(name)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise RecipeError(f"{name}: {unknown_name('option', option, known)}")
    try:
        return _adapter(name).validate_python(dict(options))
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error)}") from error


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(METHODS.get(name))


def matches(pattern: str, layer: str) -> bool:
    """Whether a glob, or a regular expression after `re:`, fits the full layer name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return fnmatch.fnmatchcase(layer, pattern)


def _pattern(text: str) -> str:
    """The pattern itself. Raises ValueError if it is no regular expression but says so."""
    try:
        matches(text, "")
    except re.error as error:
        raise ValueError(f"pattern {text!r} is not a regular expression ({error})") from error
    return text


def _explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first problem in one line: where, what, and the value found. model: whose keys are the known ones."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and model is not None:
        return f"{unknown_name('key', first['loc'][-1], _known_keys(model, first['loc']))} (in {where})"
    message = re.sub("dictionary( or instance of \\w+)?", "mapping", first["msg"].removeprefix("Value error, "))
    message = message.replace("Tuple", "List").replace("tuple", "list")
    if first["type"] not in ("value_error", "missing") and isinstance(first["input"], str | int | float | None):
        message += f", found {first['input']!r}"
    return f"{where}: {message}" if where else message


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    parts: dict[Any, type[BaseModel]] = {
        "steps": Step,
        "scheme": SchemeModel,
        "input": InputModel,
        "overrides": Override,
    }
    for part in location[:-1]:
        model = parts.get(part, model)
    return list(model.model_fields)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
