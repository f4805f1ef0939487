"""What an export starts from: which layers of a checkpoint are packed, and which modules they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from trifold.compress.packed_folder import PackedFolder
from trifold.core.errors import CheckpointError, InputError
from trifold.ecosystem.experts import is_expert, names_of
from trifold.kernels import PackedExperts, is_stacked, unstack


class Layers(NamedTuple):
    """modules: of the model without weights, experts apart, by name. packed: names of packed layers, in the model's
    order. gone: names of tensors that are left out."""

    modules: dict[str, nn.Module]
    packed: list[str]
    gone: frozenset[str]


def layers_of(source: PackedFolder, model: Any) -> Layers:
    """model: without weights; its experts are taken apart. Raises CheckpointError for a packed layer that it does not
    have, InputError for experts whose names elsewhere are not known."""
    known = set(model.state_dict())
    _unstack(source, model)
    modules = dict(model.named_modules())
    for name in source.modules:
        if name not in modules:
            raise CheckpointError(f"{source.folder}: {name} is quantised, but the architecture has no such layer")
    gone = frozenset(
        name
        for name, entry in source.tensors.items()
        if name not in known and name.endswith(".bias") and not entry.load().any()
    )  # zeros that some tools store for layers without a bias
    return Layers(modules, [name for name in modules if name in source.modules], gone)


def _unstack(source: PackedFolder, model: Any) -> None:
    """Take the experts of the skeleton apart. Raises InputError for those whose names elsewhere are not known."""
    unstack(model, set(source.modules))
    stacked = next((name for name, module in model.named_modules() if is_stacked(module)), None)
    if stacked is not None:
        raise InputError(f"{stacked}: experts that stay dense are not exported yet; the checkpoint runs as it is")
    family = source.config.get("model_type")
    expert = next(filter(is_expert, source.modules), None)
    apart = any(isinstance(module, PackedExperts) for module in model.modules())
    if apart and (expert is None or names_of(family) is None):
        raise InputError(f"{source.folder}: experts of {family} are not exported yet; the checkpoint runs as it is")
