"""The `quantization_config` of compressed-tensors: groups of layers with one scheme each."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch

from trifold.core.errors import InputError
from trifold.ecosystem import float_quantized, int_quantized, pack_quantized  # noqa: F401 - register themselves
from trifold.ecosystem.base import CODECS, Codec, Ecosystem, Settings

VERSION = "0.20.0"  # whose layout is written
_BY_TENSOR = {
    ("weight_packed", torch.int32): "pack-quantized",
    ("weight", torch.int8): "int-quantized",
    ("weight", torch.float8_e4m3fn): "float-quantized",
}
_UNREAD = ("kv_cache_scheme", "sparsity_config", "transform_config")


class CompressedTensors(Ecosystem):
    """compressed-tensors 0.15 and newer."""

    method = "compressed-tensors"

    def write(
        self, layers: Mapping[str, tuple[Codec, Settings]], dense: Collection[str], routers: Collection[str] = ()
    ) -> dict[str, Any]:
        """One scheme for all is that of the class `Linear`, without what stays dense, and what lies outside the blocks
        by name, since a head is no linear layer for vLLM; of several each names its layers, since loaders differ in
        which group they prefer."""
        members: dict[str, list[str]] = defaultdict(list)
        for name, (_, settings) in layers.items():
            members[json.dumps(settings, sort_keys=True)].append(name)
        groups = {}
        for number, (scheme, names) in enumerate(members.items()):
            outside = [name for name in names if not re.search(r"\.\d+\.", name)]
            targets = ["Linear", *outside] if len(members) == 1 else names
            groups[f"group_{number}"] = {**json.loads(scheme), "targets": targets}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.method,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": sorted([*dense, *routers]),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "global_compression_ratio": None,
            "version": VERSION,
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, torch.dtype]) -> dict[str, tuple[Codec, Settings]]:
        for key in _UNREAD:
            if config.get(key):
                raise InputError(f"compressed-tensors with a {key} is not read")
        if config.get("quantization_status", "compressed") != "compressed":
            raise InputError(
                f"quantization_status is {config['quantization_status']!r}: the weights are not compressed yet"
            )
        found: dict[str, tuple[Codec, Settings]] = {}
        for name, dtype in tensors.items():
            layer, _, leaf = name.rpartition(".")
            codec = _BY_TENSOR.get((leaf, dtype))
            if leaf == "weight_packed" and codec is None:
                raise InputError(f"{layer}: packed floats ({dtype}) are not read; known: {', '.join(_known())}")
            if codec is not None:
                settings = {**_scheme_of(layer, config), "version": config.get("version")}
                found[layer] = CODECS.get(codec), settings
        return found


def _known() -> list[str]:
    return sorted(_BY_TENSOR.values())


def _scheme_of(layer: str, config: Mapping[str, Any]) -> Settings:
    """The group of a layer: exact names come before patterns, and those before classes. Raises InputError."""
    groups = list((config.get("config_groups") or {}).items())
    for kind in (_is_name, _is_pattern, _is_class):
        for name, group in groups:
            if isinstance(group, Mapping) and any(kind(target, layer) for target in group.get("targets", ())):
                if not group.get("weights"):
                    raise InputError(f"{layer}: {name} of config_groups says nothing of its weights")
                return dict(group)
    if any(not isinstance(group, Mapping) for _, group in groups):
        raise InputError(f"config_groups by the names of presets ({groups[0][0]}) are not read")
    raise InputError(f"{layer}: quantised, but no group of config_groups has it; copy the checkpoint again")


def _is_name(target: str, layer: str) -> bool:
    return target == layer


def _is_pattern(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], layer) is not None


def _is_class(target: str, layer: str) -> bool:
    return target == "Linear"
