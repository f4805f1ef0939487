"""A compressed checkpoint as one GGUF file, the way llama.cpp loads it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trifold.compress.export_layers import layers_of
from trifold.compress.packed_folder import PackedFolder
from trifold.compress.requantize import Losses, Way, find_way, on_grids, parts_of
from trifold.compress.tensor_file import Entry
from trifold.core.canonical import Canonical, Dense
from trifold.core.errors import InputError, ProofError
from trifold.ecosystem import nearest
from trifold.ecosystem.base import quantized
from trifold.ecosystem.experts import PLAIN, parted, stack_names
from trifold.ecosystem.gguf import architecture as facts
from trifold.ecosystem.gguf.blocks import Block, block_for, refusal
from trifold.ecosystem.gguf.tokenizer import write_tokenizer

_PLAIN_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GgufTensor:
    """name, type: llama.cpp's. shape: of the weights, in torch's order. layers: packed ones that it is made of. load:
    its bytes as they are stored."""

    name: str
    type: str
    shape: tuple[int, ...]
    layers: int
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class GgufPlan:
    """config: of transformers. kind: llama.cpp's architecture. losses: filled as tensors are loaded. notices: what the
    user should know. engines: that load it."""

    config: Mapping[str, Any]
    kind: facts.Architecture
    tensors: list[GgufTensor]
    losses: Losses
    notices: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("llama.cpp",)

    @property
    def layouts(self) -> dict[str, int]:
        """How many packed layers have which type."""
        counts = Counter[str]()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.layers
        return {name: count for name, count in sorted(counts.items()) if count}


def plan_gguf(source: PackedFolder, model: Any, again: bool) -> GgufPlan:
    """What will be written. model: without weights. again: whether to round what cannot be held. Raises InputError for
    the first layer that is not held exactly, or not known."""
    _, packed, gone = layers_of(source, model)
    without = source.packed_names() | gone
    dense = {name: entry for name, entry in source.tensors.items() if name not in without}
    config = model.config.to_dict()
    kind, losses = facts.architecture(config), Losses()
    members: dict[str, list[tuple[str, int, int]]] = defaultdict(list)  # of a tensor: layer, its part, of how many
    for name in packed:
        for part, whole in enumerate(places := stack_names(name)):
            members[f"{whole}.weight"].append((name, part, len(places)))
    tensors = [_packed(source, config, kind, losses, again, *each, model.dtype) for each in members.items()]
    for name, entry in dense.items():
        if not name.endswith("rotary_emb.inv_freq"):
            tensors.append(_dense(name, entry, config, kind))
    names = {tensor.name: tensor for tensor in tensors}
    if kind.head and "output.weight" not in names:
        head = names["token_embd.weight"]
        tensors.append(GgufTensor("output.weight", head.type, head.shape, 0, head.load))
    if (factors := facts.rope_factors(config)) is not None:
        tensors.append(GgufTensor("rope_freqs.weight", "F32", tuple(factors.shape), 0, lambda: factors))
    return GgufPlan(config, kind, sorted(tensors, key=_place), losses)


def _place(tensor: GgufTensor) -> tuple[int, str]:
    """Blocks in their order, what is in none of them first."""
    first, _, rest = tensor.name.partition(".")
    return (1 + int(rest.partition(".")[0]) if first == "blk" else 0), tensor.name


def _packed(
    source: PackedFolder,
    config: Mapping[str, Any],
    kind: facts.Architecture,
    losses: Losses,
    again: bool,
    name: str,
    members: list[tuple[str, int, int]],
    dtype: torch.dtype,
) -> GgufTensor:
    """One layer, or the same of all experts, in the smallest type that holds it."""
    order = facts.row_order(name, config, kind)

    def parts(codes: bool) -> Iterator[tuple[str, Canonical]]:
        for layer, part, count in members:
            whole = source.weight(layer, codes)
            yield PLAIN.outward(layer)[part], (parts_of if again else parted)(whole, count)[part]

    found = dict(parts(codes=False))
    ways = {layer: _way(layer, weight, again, dtype) for layer, weight in found.items()}
    if any(isinstance(way, _Dense) for way in ways.values()):
        ways = dict.fromkeys(ways, _Dense(dtype))
    headers = [way.header(found[layer]) if way else found[layer] for layer, way in ways.items()]
    block = None if isinstance(headers[0], Dense) else block_for(headers)
    shape: tuple[int, ...] = headers[0].shape
    if name != f"{members[0][0]}.weight":  # a stack of experts
        shape = (len(members), *shape)

    def load() -> torch.Tensor:
        made = []
        for layer, weight in parts(codes=True):
            way = ways[layer]
            held = way(weight) if way else weight
            losses.add(layer, weight, held)
            made.append(_encoded(layer, facts.reordered(held, order), block))
        return torch.stack(made).reshape(*shape[:-1], -1)

    stored = _PLAIN_TYPES[dtype] if block is None else block.name
    return GgufTensor(facts.tensor_name(name, config, kind), stored, shape, len(members), load)


@dataclass(frozen=True)
class _Dense:
    """What was not rounded to one grid, in numbers of 16 bits, or of 32 in a model of such."""

    dtype: torch.dtype

    def __call__(self, weight: Canonical) -> Canonical:
        return Dense(weight.dequantize().to(self.dtype))

    def header(self, weight: Canonical) -> Canonical:
        return Dense(torch.empty(weight.shape, dtype=self.dtype, device="meta"))


def _way(layer: str, weight: Canonical, again: bool, dtype: torch.dtype) -> Way | _Dense | None:
    """How the weight becomes one that a block holds; None if it is one. Raises InputError unless it may change."""
    why = refusal(weight)
    if why is None:
        return None
    if not again:
        raise InputError(
            f"{layer}: gguf cannot hold it: {why}; --to {nearest(weight, dtype)} can, and --requantize rounds it again"
        )
    way = find_way(weight, refusal) if on_grids(weight) else None
    if way is None or way.scheme is None:
        return way or _Dense(dtype)
    return Way(block_for([way.header(weight)]).scheme)  # with every code that the block has room for


def _encoded(layer: str, weight: Canonical, block: Block | None) -> torch.Tensor:
    """The bytes of a weight, read back."""
    if block is None:
        return weight.values if isinstance(weight, Dense) else weight.dequantize()
    data = block.encode(quantized(weight))
    if not torch.equal(block.decode(data), weight.dequantize()):
        raise ProofError(f"{layer}: what {block.name} reads back is another weight")
    return data


def _dense(name: str, entry: Entry, config: Mapping[str, Any], kind: facts.Architecture) -> GgufTensor:
    """A tensor that is not packed, in its own dtype or the one that llama.cpp wants."""
    place, order = facts.tensor_name(name, config, kind), facts.row_order(name, config, kind)
    dtype = torch.float32 if len(entry.shape) < 2 or facts.always_float32(place) else entry.dtype
    if dtype not in _PLAIN_TYPES:
        raise InputError(f"{name}: gguf has no type for {dtype}; --to dense can hold it")

    shape = entry.shape[1:] if place.endswith("ffn_gate_inp_shexp.weight") else entry.shape  # one row, as a vector

    def load() -> torch.Tensor:
        values = entry.load().to(dtype)
        return values if order is None else values[order]

    return GgufTensor(place, _PLAIN_TYPES[dtype], shape, 0, load)


def check_tokenizer(plan: GgufPlan, folder: Path) -> None:
    """Raises InputError for a tokenizer that llama.cpp does not know. Writes nothing. folder: it is there."""
    import gguf

    write_tokenizer(gguf.GGUFWriter(None, plan.kind.name), folder, plan.config["vocab_size"], plan.config)


def write_gguf(plan: GgufPlan, file: Path, tokenizer: Path) -> int:
    """The file, read back when it is written; returns its bytes. tokenizer: the folder that it is in.

    Raises InputError for a tokenizer that llama.cpp does not know, ProofError if the file is not what was written."""
    import gguf

    sums = {}
    with contextlib.closing(gguf.GGUFWriter(file, plan.kind.name)) as writer:
        facts.write_settings(writer, plan.config, plan.kind)
        write_tokenizer(writer, tokenizer, plan.config["vocab_size"], plan.config)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(plan))
        for tensor in plan.tensors:
            stored = gguf.GGMLQuantizationType[tensor.type]
            size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, stored))
            # with a dtype of floats the shape is taken as that of the weights, whatever their type
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, stored)
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            data = tensor.load().contiguous().view(torch.uint8).numpy()
            sums[tensor.name] = hashlib.sha256(data.data).digest()
            writer.write_tensor_data(data)
        assert writer.fout is not None
        for out in writer.fout:
            out.flush()
            os.fsync(out.fileno())
    _prove(plan, file, sums)
    return file.stat().st_size


def _file_type(plan: GgufPlan) -> int:
    """What most layers are, as llama.cpp counts them; it is only shown."""
    import gguf

    counts = Counter(tensor.type for tensor in plan.tensors if len(tensor.shape) > 1)
    most = counts.most_common(1)[0][0]
    return int(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])


def _prove(plan: GgufPlan, file: Path, sums: Mapping[str, bytes]) -> None:
    """Read the file with the package's own reader."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for tensor in plan.tensors:
        read, same = found.pop(tensor.name, None), False
        if read is not None and read.tensor_type.name == tensor.type:
            same = (
                tuple(reversed(read.shape.tolist())) == tensor.shape
                and hashlib.sha256(np.ascontiguousarray(read.data).data).digest() == sums[tensor.name]
            )
        if not same:
            raise ProofError(f"{file}: {tensor.name} is read back as something else")
    if found:
        raise ProofError(f"{file}: has {next(iter(found))}, which was not written")
