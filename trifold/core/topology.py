"""Architectures as data.

Inspection finds what every decoder has: the list of blocks and the linears in it. A `Topology` adds what
inspection cannot know: which scale of which producer can be folded into which linears. The literals are in
`families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from trifold.core.dimensions import Dimensions
from trifold.core.errors import CheckpointError

Rows = Literal["all", "second half", "last", "grouped", "latent"]


@dataclass(frozen=True)
class Fold:
    """Scaling the output of `producer` by 1/s and the input columns of `consumers` by s changes nothing.

    `norm`: a normalisation with a weight (and bias), whose only readers are the consumers. `linear`: the rows of
    a linear. `value`: the rows of the value projection, which grouped queries share: s must be alike for the
    query heads of one kv head. Names are relative to the block. `inspect` is the module whose output AWQ's paper
    compares, "" for the block.

    offset: the norm multiplies by offset + weight. rows: which rows of the producer the consumers see:
    "all"; the "second half" of gate and up; of q, k and v the "last" part, or the last head of each kv "grouped"
    with its queries ([q .. q, k, v] per kv head); the last features of each head's "latent" expansion
    ([k, v] per head). when: fields of the config, dots allowed, and the value each must have.
    """

    kind: Literal["norm", "linear", "value"]
    producer: str
    consumers: tuple[str, ...]
    inspect: str
    offset: float = 0.0
    rows: Rows = "all"
    when: tuple[tuple[str, Any], ...] = ()

    def holds(self, config: Any) -> bool:
        """Whether a model of this config has the fold. A field that is absent counts as None."""
        for path, value in self.when:
            found = config
            for name in path.split("."):
                found = getattr(found, name, None)
            if found != value:
                return False
        return True


@dataclass(frozen=True)
class Topology:
    """One model. folds: in the order of execution; of those, a block has the ones whose layers it has.
    head_dim: features of one value head (0: unknown). dimensions: what a block can lose."""

    folds: tuple[Fold, ...] = ()
    head_dim: int = 0
    dimensions: Dimensions = field(default_factory=Dimensions)


def text_decoder(model: Any) -> tuple[str, Any]:
    """Path and module of the part that maps token embeddings to hidden states; the model itself if it has no
    part of that kind."""
    decoder = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else None
    return next(((name, module) for name, module in model.named_modules() if module is decoder), ("", model))


def towers(model: Any) -> tuple[str, ...]:
    """Paths of what is neither the text decoder nor the head: vision and audio towers, and their projectors."""
    decoder, _ = text_decoder(model)
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    found: list[str] = []
    for name, module in model.named_modules() if decoder else ():
        inside = any(name == known or name.startswith(known + ".") for known in (decoder, *found))
        around = not name or decoder.startswith(name + ".")
        if not inside and not around and module is not head and any(p.numel() for p in module.parameters()):
            found.append(name)
    return tuple(found)


def find_blocks(model: nn.Module) -> str:
    """Path of the text decoder's blocks: the ModuleList with the most parameters that lies in no other one.

    Works on the meta device. Raises CheckpointError if the model has none.
    """
    path, decoder = text_decoder(model)
    outer: dict[str, int] = {}
    for name, module in decoder.named_modules(prefix=path):
        if isinstance(module, nn.ModuleList) and not any(name.startswith(known + ".") for known in outer):
            outer[name] = sum(p.numel() for p in module.parameters())
    if not outer or not max(outer.values()):
        raise CheckpointError(f"{type(model).__name__} has no list of decoder blocks, so it cannot be streamed")
    return max(outer, key=lambda name: outer[name])
