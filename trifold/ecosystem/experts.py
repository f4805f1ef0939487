"""Experts of mixtures as other tools name them: one linear for the gate, one for up, one for down.

Ours are `mlp.experts.{e}.up`, which has the gate's rows before its own, and `mlp.experts.{e}.down`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trifold.core.canonical import Canonical, Dense, Quantized, RoundedInput, Split

_OURS = re.compile(r"(?P<block>.+)\.mlp\.experts\.(?P<expert>\d+)\.(?P<leaf>up|down)")


@dataclass(frozen=True)
class ExpertNames:
    """mixture: the module that the experts are in. gate, up, down: their linears."""

    mixture: str
    gate: str
    up: str
    down: str

    def outward(self, name: str) -> list[str]:
        """What another tool calls a layer or tensor of ours: two names for an `up`, the gate's first."""
        found = _OURS.fullmatch(name)
        if found is None:
            return [name.replace(".mlp.", f".{self.mixture}.")]
        leaves = [self.gate, self.up] if found["leaf"] == "up" else [self.down]
        return [f"{found['block']}.{self.mixture}.experts.{found['expert']}.{leaf}" for leaf in leaves]

    def inward(self, layer: str) -> tuple[str, int]:
        """The layer of ours that another tool's is a part of, and which: 0 is the first."""
        found = re.fullmatch(rf"(.+)\.{self.mixture}\.experts\.(\d+)\.({self.gate}|{self.up}|{self.down})", layer)
        if found is None:
            return layer.replace(f".{self.mixture}.", ".mlp."), 0
        leaf = "down" if found[3] == self.down else "up"
        return f"{found[1]}.mlp.experts.{found[2]}.{leaf}", int(found[3] == self.up)


PLAIN = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
_FAMILIES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"), PLAIN),
}


def names_of(model_type: str | None) -> ExpertNames | None:
    """The names of a family's experts, None if it is not known to have such."""
    return _FAMILIES.get(model_type or "")


def is_expert(name: str) -> bool:
    """Whether a layer of ours is of an expert."""
    return _OURS.fullmatch(name) is not None


def stack_names(name: str) -> list[str]:
    """Where the experts of a block lie side by side, in what a layer of ours is a part of; else only its name."""
    found = _OURS.fullmatch(name)
    if found is None:
        return [name]
    leaves = [PLAIN.gate, PLAIN.up] if found["leaf"] == "up" else [PLAIN.down]
    return [f"{found['block']}.mlp.experts.{leaf}" for leaf in leaves]


def parted(weight: Canonical, count: int) -> list[Canonical]:
    """A weight's rows in equal parts; a weight of another kind than those that are exported stays whole."""
    match weight:
        case RoundedInput(inner, _, _):
            return [replace(weight, weight=part) for part in parted(inner, count)]
        case Dense(values):
            return [Dense(part) for part in values.chunk(count)]
        case Quantized(codes, scale, zero, scheme) if scheme.group_size == "tensor":
            return [Quantized(part, scale, zero, scheme) for part in codes.chunk(count)]
        case Quantized(codes, scale, zero, scheme):
            zeros: Sequence[torch.Tensor | None] = [None] * count if zero is None else zero.chunk(count)
            parts = zip(codes.chunk(count), scale.chunk(count), zeros, strict=True)
            return [Quantized(*part, scheme) for part in parts]
    return [weight] * count


def joined(parts: Sequence[Canonical]) -> Canonical:
    """One weight from the rows of several: of one kind where they share a scheme, else a split of the rows."""
    first, *rest = parts
    if not rest:
        return first
    if isinstance(first, Quantized) and first.scheme.group_size != "tensor":
        alike = [part for part in parts if isinstance(part, Quantized) and part.scheme == first.scheme]
        if len(alike) == len(parts):
            zeros = [part.zero_point for part in alike if part.zero_point is not None]
            codes, scale = torch.cat([part.codes for part in alike]), torch.cat([part.scale for part in alike])
            return Quantized(codes, scale, torch.cat(zeros) if zeros else None, first.scheme)
    if isinstance(first, RoundedInput) and not first.scheme.static:
        whole = joined([part.weight if isinstance(part, RoundedInput) else part for part in parts])
        if isinstance(whole, Quantized) and all(
            isinstance(p, RoundedInput) and p.scheme == first.scheme for p in parts
        ):
            return RoundedInput(whole, first.scheme)
    index = torch.arange(len(parts)).repeat_interleave(torch.tensor([part.shape[0] for part in parts]))
    return Split(0, index, tuple(parts))
