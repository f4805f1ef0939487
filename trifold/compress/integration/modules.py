"""Packed modules in place of dense ones, as a checkpoint's `modules` entry says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trifold.compress.compressed import Compressed
from trifold.compress.integration.sliced_attention import SlicedAttention
from trifold.compress.slicing import Slices, slice_modules
from trifold.core.errors import CheckpointError, InputError
from trifold.core.linears import is_embedding, is_linear, is_transposed, weight_of
from trifold.formats import FORMATS, Spec
from trifold.kernels import PackedEmbedding, PackedLinear, PackedModule, SharedInput, TiedLinear, unstack


def replace_modules(model: nn.Module, modules: Mapping[str, Spec], slices: Slices | None = None) -> None:
    """Put an empty packed module, on the device of the dense one, wherever a spec says so; before that make smaller
    what has other dimensions than the model's config says.

    Experts that a name singles out are taken from their stack. Raises CheckpointError if a name or a shape does
    not fit the model.
    """
    slice_modules(model, slices or {})
    unstack(model, set(modules))
    for name, spec in modules.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"config.json: no layer {name!r} in {type(model).__name__}") from error
        model.set_submodule(name, _packed(name, dense, spec))
    _tie(model)
    _share_inputs(model)


def _tie(model: nn.Module) -> None:
    """Let output heads that share an embedding's weight run on its packed table."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(tied.items()):
        table, name = model.get_submodule(source.rpartition(".")[0]), target.rpartition(".")[0]
        if isinstance(table, PackedEmbedding):
            bias = getattr(model.get_submodule(name), "bias", None)
            model.set_submodule(name, TiedLinear(table, bias is not None, table.dtype if bias is None else bias.dtype))
            del tied[target]  # or transformers would look for a parameter to tie


def _share_inputs(model: nn.Module) -> None:
    """Let packed linears beside each other find out which of them are given the same tensor."""
    for parent in model.modules():
        if isinstance(parent, PackedModule):
            continue
        beside: dict[int, list[PackedLinear]] = {}
        for child in parent.children():
            if type(child) is PackedLinear:
                beside.setdefault(child.in_features, []).append(child)
        for linears in beside.values():
            shared = SharedInput() if len(linears) > 1 else None
            for linear in linears:
                linear.beside = shared


def _packed(name: str, dense: nn.Module, spec: Spec) -> PackedModule:
    if not is_linear(dense) and not is_embedding(dense):
        raise CheckpointError(f"config.json: {name} is a {type(dense).__name__}, not a linear layer or embedding")
    if not isinstance(spec, dict) or not {"format", "shape"} <= spec.keys():
        raise CheckpointError(
            f"config.json: the entry of {name} names no format or no shape; copy the checkpoint again"
        )
    _check_known(name, spec)
    weight, bias = dense.get_parameter("weight"), getattr(dense, "bias", None)
    shape = list(reversed(weight.shape)) if is_transposed(dense) else list(weight.shape)
    if shape != list(spec["shape"]):
        raise CheckpointError(f"config.json: {name} has shape {shape}, its entry says {spec['shape']}")
    try:
        with torch.device(weight.device):
            packed: PackedModule
            if is_embedding(dense):
                packed = PackedEmbedding(spec, weight.dtype)
            else:
                added = spec.get("bias") is True
                packed = PackedLinear(spec, added or bias is not None, weight.dtype if bias is None else bias.dtype)
    except InputError as error:
        raise CheckpointError(f"config.json: {name}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"config.json: the entry of {name} is damaged ({error!r}); copy it again") from error
    return packed.train(dense.training)


def _check_known(name: str, spec: Spec) -> None:
    """Raise CheckpointError if the weight, or a part of it, is in a format of a later version."""
    if spec["format"] not in FORMATS:
        raise CheckpointError(
            f"config.json: {name} is stored as {spec['format']!r}, which this Trifold does not read; "
            "pip install --upgrade trifold"
        )
    for part in spec.get("parts", ()):
        _check_known(name, part)


def install(model: Any, compressed: Compressed) -> None:
    """Put finished layers into a live model, with every parameter that compression rewrote."""
    replace_modules(model, compressed.modules, _not_yet(model, compressed.slices))
    for name, tensor in compressed.tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf].data = tensor.to(module._parameters[leaf].device)
        else:
            setattr(module, leaf, tensor.to(module._buffers[leaf].device))


def _not_yet(model: Any, slices: Slices) -> Slices:
    """The slices that a live model, whose blocks may have been cut in place, does not have."""
    return {
        name: entry
        for name, entry in slices.items()
        if not isinstance(model.get_submodule(name), SlicedAttention)
        and ("shape" not in entry or list(weight_of(model.get_submodule(name)).shape) == list(entry["of"]))
    }
