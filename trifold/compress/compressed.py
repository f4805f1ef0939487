"""What a compression has decided so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trifold.compress.slicing import Slices
from trifold.core.canonical import Canonical
from trifold.formats import Spec, describe, digest, pack


@dataclass
class Compressed:
    """What is known of finished layers, by full name.

    tensors: as stored. modules: specs for the checkpoint's config. report: error, bits, events per layer.
    digests: SHA-256 of the stored tensors of each layer. slices: what has other dimensions than the model's config
    says (`slicing.py`).
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, Spec] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    slices: Slices = field(default_factory=dict)

    def note(
        self,
        modules: Mapping[str, Spec],
        report: Mapping[str, Any],
        digests: Mapping[str, str],
        slices: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Take over what is known of other layers, without their tensors."""
        self.modules.update(modules)
        self.report.update(report)
        self.digests.update(digests)
        self.slices.update(slices or {})

    def add(self, name: str, canonical: Canonical, new_bias: bool = False) -> None:
        """Pack a layer's decision. new_bias: whether it has a bias that the dense layer has not."""
        tensors = pack(canonical)
        self.modules[name] = describe(canonical) | ({"bias": True} if new_bias else {})
        self.digests[name] = digest(tensors)
        self.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
