"""Architectures as data.

Inspection finds what every decoder has: the list of blocks and the linears in it. A `Topology` literal adds
what inspection cannot know: which scale of which producer can be folded into which linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from trifold.core.errors import CheckpointError


@dataclass(frozen=True)
class Fold:
    """Scaling the output of `producer` by 1/s and the input columns of `consumers` by s changes nothing.

    `norm`: a normalisation with a weight (and bias). `linear`: the rows of a linear. `value`: the rows of the
    value projection, which grouped queries share: s must be alike for the query heads of one kv head.
    Names are relative to the block. `inspect` is the module whose output AWQ's paper compares.
    """

    kind: Literal["norm", "linear", "value"]
    producer: str
    consumers: tuple[str, ...]
    inspect: str


@dataclass(frozen=True)
class Topology:
    """One family. folds: in the order of execution. head_dim: features of one attention head (0: unknown)."""

    folds: tuple[Fold, ...] = ()
    head_dim: int = 0


_LLAMA_FOLDS = (
    Fold("norm", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    Fold("value", "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
    Fold("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    Fold("linear", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
)

_GPT2_FOLDS = (
    Fold("norm", "ln_1", ("attn.c_attn",), "attn"),
    Fold("norm", "ln_2", ("mlp.c_fc",), "mlp"),
)

FOLDS: dict[str, tuple[Fold, ...]] = {"llama": _LLAMA_FOLDS, "qwen3": _LLAMA_FOLDS, "gpt2": _GPT2_FOLDS}
"""By `config.model_type`. A family that is absent is served by inspection alone."""


def topology_of(model_type: str, head_dim: int) -> Topology:
    """The literal of a family, or an empty topology for one that is only inspected."""
    return Topology(FOLDS.get(model_type, ()), head_dim)


def find_blocks(model: nn.Module) -> str:
    """Path of the decoder blocks: the ModuleList with the most parameters that lies in no other one.

    Works on the meta device. Raises CheckpointError if the model has none.
    """
    outer: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(known + ".") for known in outer):
            outer[name] = sum(p.numel() for p in module.parameters())
    if not outer or not max(outer.values()):
        raise CheckpointError(f"{type(model).__name__} has no list of decoder blocks, so it cannot be streamed")
    return max(outer, key=lambda name: outer[name])
