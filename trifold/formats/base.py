"""What a format is: canonical tensors <-> stored tensors, bit-exact both ways."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from trifold.core.canonical import Canonical
from trifold.core.registry import Registry

Spec = dict[str, Any]
"""What the checkpoint's config says of one weight: JSON, with at least `format` and `shape` (out, in)."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name (relative to the module) -> shape and dtype on disk."""


class Format(ABC):
    """Pure functions; the inputs are never modified."""

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


def format_for(canonical: Canonical) -> str:
    """Name of the format that stores this tensor exactly. Raises TypeError if none does."""
    for name in FORMATS:
        if FORMATS.get(name).holds(canonical):
            return name
    raise TypeError(f"no format stores a {type(canonical).__name__}; known: {', '.join(FORMATS)}")


def stored_bytes(spec: Spec) -> int:
    """Bytes that a weight so described takes on disk."""
    total = 0
    for shape, dtype in FORMATS.get(spec["format"]).layout(spec).values():
        total += int(torch.Size(shape).numel()) * dtype.itemsize
    return total


def bits_per_weight(spec: Spec) -> float:
    """8 x stored bytes (codes, padding, scales, zero-points) / elements of the dense weight."""
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
