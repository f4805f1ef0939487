"""A compressed checkpoint, ours or another ecosystem's, as our specs and tensors, none of them loaded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trifold.compress.checkpoint import QUANT_METHOD, check_version
from trifold.compress.files import DTYPES, reason, shard_files
from trifold.compress.tensor_file import Entry, stored
from trifold.core.canonical import Canonical
from trifold.core.errors import CheckpointError, InputError
from trifold.ecosystem import ECOSYSTEMS, Codec, Settings
from trifold.ecosystem.experts import PLAIN, is_expert, joined, names_of
from trifold.formats import FORMATS, Spec, describe, layout, pack, unpack
from trifold.formats.quantized import QuantizedFormat

_CODES = "weight"  # in our formats


@dataclass(frozen=True)
class PackedFolder:
    """config: config.json, without its quantization_config. modules: as in our own config.json. tensors: all of the
    checkpoint's by the names that our own would have; those of another ecosystem's layers are converted as they are
    loaded. method: the `quant_method` of the files.
    """

    folder: Path
    config: dict[str, Any]
    method: str
    modules: dict[str, Spec]
    tensors: dict[str, Entry]

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the tensors that are not packed, float32 if there are none of floats."""
        packed = self.packed_names()
        found = (entry.dtype for name, entry in self.tensors.items() if name not in packed)
        return next((dtype for dtype in found if dtype in DTYPES.values()), torch.float32)

    def packed_names(self) -> set[str]:
        """Names of the tensors that belong to `modules`."""
        return {f"{name}.{leaf}" for name, spec in self.modules.items() for leaf in layout(spec)}

    def weight(self, name: str, codes: bool = True) -> Canonical:
        """A layer's weight. Without `codes` those of a plainly quantised one are on the meta device, not read."""
        spec, tensors = self.modules[name], {}
        codes = codes or not isinstance(FORMATS.get(spec["format"]), QuantizedFormat)
        for leaf in layout(spec):
            entry = self.tensors[f"{name}.{leaf}"]
            unread = not codes and leaf == _CODES
            tensors[leaf] = torch.empty(entry.shape, dtype=entry.dtype, device="meta") if unread else entry.load()
        return unpack(tensors, spec)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises CheckpointError if it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no JSON object; copy the checkpoint again")
    return found


def is_foreign(quantization: Any) -> bool:
    """Whether a `quantization_config` is of another ecosystem whose checkpoints are read."""
    return isinstance(quantization, Mapping) and quantization.get("quant_method") in ECOSYSTEMS


def open_packed(folder: Path) -> PackedFolder:
    """A checkpoint from its config and headers. Raises CheckpointError or InputError for one that is not read."""
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None) or {}
    method = quantization.get("quant_method")
    if method != QUANT_METHOD and method not in ECOSYSTEMS:
        found = method or "none, the model is dense"
        known = ", ".join((QUANT_METHOD, *ECOSYSTEMS))
        raise CheckpointError(
            f"{folder}: not a compressed checkpoint that is read (quantisation: {found}; known: {known})"
        )
    entries: dict[str, Entry] = {}
    for file in sorted(set(shard_files(folder).values())):
        try:
            entries.update(stored(file))
        except KeyError as error:
            raise CheckpointError(f"{file}: holds tensors of dtype {error}, which is not read") from error
    if method in ECOSYSTEMS:
        modules, tensors = _converted(folder, quantization, entries, config.get("model_type"))
        return PackedFolder(folder, config, method, modules, tensors)
    check_version(quantization.get("format_version"))
    for name in quantization.get("slices", ()):
        raise InputError(f"{folder}: {name} was cut to a size that no other layout can say; it stays with Trifold")
    try:
        modules = dict(quantization["modules"])
        for name, spec in modules.items():
            _check(folder, name, spec, entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: damaged entry in `modules` ({error!r}); copy it again") from error
    return PackedFolder(folder, config, method, modules, entries)


def _check(folder: Path, name: str, spec: Spec, entries: Mapping[str, Entry]) -> None:
    if spec.get("format") not in FORMATS:
        raise CheckpointError(f"{folder}: {name} is stored as {spec.get('format')!r}, which this Trifold does not read")
    for leaf, (shape, dtype) in layout(spec).items():
        entry = entries.get(f"{name}.{leaf}")
        if entry is None or entry.shape != tuple(shape) or entry.dtype != dtype:
            raise CheckpointError(f"{folder}: {name}.{leaf} is not as its entry says; copy the checkpoint again")


def _converted(
    folder: Path, quantization: Mapping[str, Any], entries: Mapping[str, Entry], model_type: str | None
) -> tuple[dict[str, Spec], dict[str, Entry]]:
    """Specs and tensors of another ecosystem's files."""
    ecosystem = ECOSYSTEMS[quantization["quant_method"]]
    layers = ecosystem.read(quantization, {name: entry.dtype for name, entry in entries.items()})
    if not layers:
        raise CheckpointError(
            f"{folder}: config.json says {ecosystem.method}, but no layer is quantised; copy it again"
        )
    rest, modules, tensors = dict(entries), dict[str, Spec](), dict[str, Entry]()
    members: dict[str, dict[int, str]] = defaultdict(dict)  # of our layer, theirs: more than one for an expert
    owned: dict[str, dict[str, Entry]] = {}
    names = names_of(model_type) or PLAIN
    for name, (codec, settings) in layers.items():
        found = {leaf: rest.pop(f"{name}.{leaf}", None) for leaf in sorted(codec.leaves(settings))}
        owned[name] = {leaf: entry for leaf, entry in found.items() if entry is not None}
        ours, place = names.inward(name)
        members[ours][place] = name

    def weight(name: str, codes: bool = True) -> Canonical:
        parts = [part for _, part in sorted(members[name].items())]
        return joined([_decode(part, *layers[part], owned[part], codes) for part in parts])

    @lru_cache(maxsize=1)  # a layer's tensors are asked for one after the other
    def converted(name: str) -> dict[str, torch.Tensor]:
        return pack(weight(name))

    def entry(name: str, leaf: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
        return Entry(tuple(shape), dtype, lambda: converted(name)[leaf])

    for name, parts in members.items():
        if is_expert(name) and name.endswith(".up") and len(parts) < 2:
            raise CheckpointError(f"{folder}: {parts.popitem()[1]} is quantised, but not its gate or up; quantise both")
        modules[name] = describe(weight(name, codes=False))
        tensors.update({f"{name}.{leaf}": entry(name, leaf, *of) for leaf, of in layout(modules[name]).items()})
    return modules, {**rest, **tensors}


def _decode(name: str, codec: Codec, settings: Settings, own: Mapping[str, Entry], codes: bool = True) -> Canonical:
    found = {}
    for leaf, entry in own.items():
        unread = not codes and leaf == codec.codes
        found[leaf] = torch.empty(entry.shape, dtype=entry.dtype, device="meta") if unread else entry.load()
    try:
        return codec.decode(found, settings)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else reason(error)
        raise CheckpointError(
            f"{name}: its {codec.name} tensors do not fit each other ({why}); copy them again"
        ) from error
