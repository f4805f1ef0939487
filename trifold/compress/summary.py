"""What a compressed checkpoint holds, from its config and headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trifold.compress.checkpoint import QUANT_METHOD, check_version
from trifold.compress.files import shard_files
from trifold.compress.packed_folder import is_foreign, open_packed, read_json
from trifold.compress.slicing import Slices
from trifold.compress.tensor_file import stored
from trifold.core.errors import CheckpointError
from trifold.formats import Spec, bits_per_weight, label, layout, stored_bytes

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def totals(
    modules: Mapping[str, Spec], other: Mapping[str, tuple[int, int]], dense_item: int, slices: Slices | None = None
) -> dict[str, Any]:
    """Sizes of a checkpoint. other: name -> (elements, bytes) of tensors that belong to no compressed layer
    (biases among them). dense_item: bytes of a dense element. slices: of these linears the elements count that they
    had, and their weights as compressed.

    bits_per_weight covers the compressed linears; model_bits_per_weight every tensor; dense_bytes is what the
    dense model would take in the same dtype.
    """
    cut = {name: entry for name, entry in (slices or {}).items() if "shape" in entry}
    packed = sum(stored_bytes(spec) for spec in modules.values())
    weights = sum(math.prod(cut[name]["of"] if name in cut else spec["shape"]) for name, spec in modules.items())
    for name, entry in cut.items():
        if name not in modules:
            packed += other[f"{name}.weight"][1]
            weights += math.prod(entry["of"])
    other = {n: v for n, v in other.items() if n.removesuffix(".weight") not in cut}
    rest, rest_bytes = sum(n for n, _ in other.values()), sum(b for _, b in other.values())
    return {
        "bits_per_weight": 8 * packed / weights,
        "model_bits_per_weight": 8 * (packed + rest_bytes) / (weights + rest),
        "total_bytes": packed + rest_bytes,
        "dense_bytes": weights * dense_item + rest_bytes,
    }


def live_totals(model: Any) -> dict[str, Any]:
    """`totals` of a loaded model, as it is in memory. Of a dense one only model_bits_per_weight, of one that is
    quantised otherwise nothing.
    """
    quantization = getattr(model.config, "quantization_config", None)
    modules = getattr(quantization, "modules", {})
    if quantization is not None and getattr(quantization, "quant_method", None) != QUANT_METHOD:
        return {}
    saved = set(model.state_dict())  # not what is computed at load, such as rotary frequencies
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # tied ones once
    packed = _stored_names(modules)
    other = {k: (t.numel(), t.nbytes) for k, t in tensors.items() if k in saved and k not in packed}
    slices = getattr(quantization, "slices", {})
    if not modules and not slices:
        return {"model_bits_per_weight": 8 * sum(b for _, b in other.values()) / sum(n for n, _ in other.values())}
    return totals(modules, other, model.dtype.itemsize, slices)


def summarise(folder: Path) -> dict[str, Any]:
    """Layers and totals of a checkpoint of ours, or of another ecosystem in our layout of its codes.

    Raises CheckpointError or InputError if it is none that is read.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    item = _DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    if is_foreign(quantization):
        packed = open_packed(folder)
        layers = {name: _layer(spec, {}) for name, spec in packed.modules.items()}
        names = packed.packed_names()
        other = {k: (math.prod(e.shape), e.nbytes) for k, e in packed.tensors.items() if k not in names}
        return {**totals(packed.modules, other, item), "layers": layers}
    if quantization.get("quant_method") != QUANT_METHOD:
        found = quantization.get("quant_method", "none, the model is dense")
        raise CheckpointError(f"{folder}: not a Trifold checkpoint (quantisation: {found})")
    check_version(quantization.get("format_version"))
    report = folder / "report.json"
    errors = read_json(report).get("layers", {}) if report.exists() else {}
    try:
        modules = quantization["modules"]
        slices = quantization.get("slices", {})
        layers = {name: _layer(spec, errors.get(name, {})) for name, spec in modules.items()}
        others = _others(folder, modules)
        layers = _with_slices(layers, slices, others, errors)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: damaged entry in `modules` ({error!r}); copy it again") from error
    item = _DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    return {**totals(modules, others, item, slices), "layers": layers}


def _with_slices(
    layers: dict[str, dict[str, Any]],
    slices: Slices,
    others: Mapping[str, tuple[int, int]],
    errors: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Layers in the order of the slices, each with what it was; bits are those per weight that it had."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in slices.items():
        if "shape" not in entry:
            sizes = [entry["qk_dim"], entry["v_dim"]]
            text = f"heads of {entry['head_dim']}: q, k {sizes[0]}, v {sizes[1]}"
            count, size = others.get(f"{name}.rotary_index", (0, 0))
            found[name] = {"format": "sliced", "describe": text, "shape": sizes, "bits_per_weight": None, "bytes": size}
            found[name] |= {"error": None, "error_of": None}
            continue
        count, size = others.get(f"{name}.weight", (1, 0))
        dense = {
            "format": "dense",
            "describe": f"{8 * size // count}-bit floats",
            "shape": entry["shape"],
            "bytes": size,
        }
        layer = layers.get(name) or dense | {k: errors.get(name, {}).get(k) for k in ("error", "error_of")}
        of = math.prod(entry["of"])
        if entry["shape"] != entry["of"]:
            layer["describe"] += " of " + "x".join(map(str, entry["of"]))
        found[name] = layer | {"bits_per_weight": 8 * layer["bytes"] / of}
    return found | {name: layer for name, layer in layers.items() if name not in found}


def _layer(spec: Spec, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": spec["format"],
        "describe": label(spec),
        "shape": spec["shape"],
        "bits_per_weight": bits_per_weight(spec),
        "bytes": stored_bytes(spec),
        "error": entry.get("error"),
        "error_of": entry.get("error_of"),
    }


def _stored_names(modules: Mapping[str, Spec]) -> set[str]:
    return {f"{name}.{leaf}" for name, spec in modules.items() for leaf in layout(spec)}


def _others(folder: Path, modules: Mapping[str, Spec]) -> dict[str, tuple[int, int]]:
    packed = _stored_names(modules)
    found = {}
    for file in sorted(set(shard_files(folder).values())):
        for key, entry in stored(file).items():
            if key not in packed:
                found[key] = (math.prod(entry.shape), entry.nbytes)
    return found
