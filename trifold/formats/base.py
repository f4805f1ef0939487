"""What a format is: canonical tensors <-> stored tensors, bit-exact both ways."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from trifold.core.canonical import Canonical, RoundedInput
from trifold.core.errors import CheckpointError
from trifold.core.inputs import InputScheme
from trifold.core.registry import Registry

Spec = dict[str, Any]
"""What the checkpoint's config says of one weight: JSON, with at least `format` and `shape` (out, in).

`input` says how the activations that meet it are rounded, in any format. `parts` are the specs of what it is put
together from; the tensors of part i are those of its own format, under `parts.i.`.
"""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name (relative to the module) -> shape and dtype on disk."""


class Format(ABC):
    """Pure functions; the inputs are never modified. They know nothing of `input`, which the functions below add."""

    last_resort: ClassVar[bool] = False
    """Whether another format that holds a tensor, too, is the better one."""

    @abstractmethod
    def holds(self, canonical: Canonical) -> bool:
        """Whether this format can store the tensor exactly."""

    @abstractmethod
    def describe(self, canonical: Canonical) -> Spec:
        """Everything `layout` and `unpack` need beside the tensors."""

    def label(self, spec: Spec) -> str:
        """The spec in a few characters, such as `int4 g128 asym`."""
        return str(spec["format"])

    @abstractmethod
    def layout(self, spec: Spec) -> Layout:
        """The stored tensors of a weight so described."""

    @abstractmethod
    def pack(self, canonical: Canonical) -> dict[str, torch.Tensor]:
        """The stored tensors, exactly as `layout(describe(canonical))` says."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Canonical:
        """The inverse of `pack`."""


FORMATS: Registry[Format] = Registry("format")


INPUT_SCALE = "input_scale"


def format_for(canonical: Canonical) -> str:
    """Name of the format that stores this tensor exactly. Raises TypeError if none does."""
    if isinstance(canonical, RoundedInput):
        return format_for(canonical.weight)
    for name in sorted(FORMATS, key=lambda name: FORMATS.get(name).last_resort):
        if FORMATS.get(name).holds(canonical):
            return name
    raise TypeError(f"no format stores a {type(canonical).__name__}; known: {', '.join(FORMATS)}")


def describe(canonical: Canonical) -> Spec:
    """The spec of a canonical tensor, in the format that stores it."""
    if isinstance(canonical, RoundedInput):
        return describe(canonical.weight) | {"input": canonical.scheme.to_dict()}
    return FORMATS.get(format_for(canonical)).describe(canonical)


def label(spec: Spec) -> str:
    """A spec in a few characters, such as `int4 g128 asym`, with what its input is rounded to, `a8`."""
    words = FORMATS.get(spec["format"]).label(spec)
    return f"{words} {InputScheme(**spec['input']).label}" if spec.get("input") else words


def layout(spec: Spec) -> Layout:
    """Every stored tensor of a weight so described. Raises InputError if no weight can be so."""
    found = FORMATS.get(spec["format"]).layout(spec)
    if spec.get("input") and "parts" in spec:
        raise CheckpointError(f"a {spec['format']} has an `input`, which belongs to its parts")
    static = spec.get("input") and InputScheme(**spec["input"]).static
    return {**found, INPUT_SCALE: ((1,), torch.float32)} if static else found


def pack(canonical: Canonical) -> dict[str, torch.Tensor]:
    """The stored tensors, exactly as `layout(describe(canonical))` says."""
    if not isinstance(canonical, RoundedInput):
        return FORMATS.get(format_for(canonical)).pack(canonical)
    tensors = pack(canonical.weight)
    return tensors if canonical.scale is None else {**tensors, INPUT_SCALE: canonical.scale}


def unpack(tensors: Mapping[str, torch.Tensor], spec: Spec) -> Canonical:
    """The inverse of `pack`."""
    weight = FORMATS.get(spec["format"]).unpack(tensors, spec)
    return RoundedInput(weight, InputScheme(**spec["input"]), tensors.get(INPUT_SCALE)) if spec.get("input") else weight


def leaves(spec: Spec) -> Iterator[Spec]:
    """The spec itself, or those of its parts that have no parts."""
    if "parts" not in spec:
        yield spec
    for part in spec.get("parts", ()):
        yield from leaves(part)


def rounds_input(spec: Spec) -> bool:
    """Whether activations are rounded anywhere in it."""
    return any(leaf.get("input") for leaf in leaves(spec))


def stored_bytes(spec: Spec) -> int:
    """Bytes that a weight so described takes on disk."""
    return sum(int(torch.Size(shape).numel()) * dtype.itemsize for shape, dtype in layout(spec).values())


def bits_per_weight(spec: Spec) -> float:
    """8 x stored bytes (codes, padding, scales, zero-points, indices) / elements of the dense weight."""
    rows, columns = spec["shape"]
    return 8 * stored_bytes(spec) / (rows * columns)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()
