"""The round-trip proof: what lies on disk is what compression decided, and runs to the same logits.

The written checkpoint is walked block by block, with packed modules and dispatched kernels, over the first
calibration batch. Stored tensors must be bit-equal to the decided ones, logits close to the reference that
used dequantised weights and plain matrix products. Except in float32 with activations as they are, each block
starts from the reference, and may differ as much as plain products part by part differ from such of whole weights:
what is rounded between two factors grows with the second one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trifold.compress.capture import Call, Tail, capture_calls, own_state
from trifold.compress.compressed import Compressed
from trifold.compress.files import shard_files
from trifold.compress.integration.modules import replace_modules
from trifold.compress.journal import Journal, reference
from trifold.compress.source import Source, materialise_buffers
from trifold.core.canonical import Canonical, Dense
from trifold.core.errors import ProofError
from trifold.core.product import Product, product
from trifold.formats import digest, layout, pack, rounds_input, unpack
from trifold.kernels.packed_linear import PackedLinear

LOGITS_FP32 = 1e-3
KL, RELATIVE_L2 = 1e-3, 2e-2
ROUNDING = 1.5
"""In 16 bits, how often what plain products round between factors a block may differ from the reference."""
_ROWS_AT_ONCE = 64  # positions whose logits are compared together


class Written:
    """Tensors of a finished folder, read a block at a time into a skeleton with packed modules."""

    def __init__(self, folder: Path, skeleton: Any) -> None:
        self.files, self.model = shard_files(folder), skeleton

    def tensors(self, prefix: str, inside: bool = True) -> dict[str, torch.Tensor]:
        """The stored tensors whose names begin so, or (`inside` false) do not. No other one is read."""
        names = [name for name in self.files if name.startswith(prefix) is inside]
        found = {}
        for file in sorted({self.files[name] for name in names}):
            with safe_open(file, framework="pt") as handle:
                found.update({name: handle.get_tensor(name) for name in names if self.files[name] == file})
        return found

    def fill(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Set parameters and buffers by name."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = torch.nn.Parameter(tensor.to(device), requires_grad=False)
            else:
                setattr(module, leaf, tensor.to(device))

    def empty(self, prefix: str) -> None:
        """Give a block's memory back."""
        block = self.model.get_submodule(prefix[:-1])
        persistent = {name: t.to("meta") for name, t in block.state_dict().items()}
        self.fill({prefix + name: t for name, t in persistent.items()}, torch.device("meta"))


def prove(folder: Path, decided: Compressed, journal: Journal, ids: torch.Tensor, source: Source) -> dict[str, float]:
    """Walk the written checkpoint. Raises ProofError naming the layer or block; returns the measured distances."""
    _bit_equal(folder, decided)
    written = Written(folder, _skeleton(source, decided))
    model, device = written.model, source.device
    blocks = model.get_submodule(source.blocks)
    written.fill(written.tensors(source.blocks + ".", inside=False), device)
    model.tie_weights()
    rounded = any(map(rounds_input, decided.modules.values()))
    exact = source.dtype == torch.float32 and not rounded
    captured = capture_calls(model, blocks, ids.to(device))
    hidden = captured.hidden
    for index, call in enumerate(captured.calls):
        prefix = f"{source.blocks}.{index}."
        written.fill(written.tensors(prefix), device)
        with torch.no_grad():
            entered, hidden = hidden, call.run(blocks[index], hidden)
        wanted = journal.kept(reference(index))["hidden"].to(device)
        distance, limit = _distance(hidden, wanted), LOGITS_FP32 if exact else RELATIVE_L2
        if not (exact or distance <= limit):
            packed = [model.get_submodule(name) for name in decided.modules if name.startswith(prefix)]
            limit = max(limit, ROUNDING * _rounding(blocks[index], packed, call, entered))
        if not distance <= limit:
            what = f"{source.blocks}.{index}: hidden states from disk differ from the reference by"
            raise ProofError(f"{what} {distance:.2e} (limit {limit:.1e})")
        if not exact:  # kernels round elsewhere than the reference does, and that grows from block to block
            hidden = wanted
        written.empty(prefix)
    with torch.no_grad():
        logits = Tail(model, blocks, captured.arity)(hidden, ids.to(device))
    return compare_logits(logits, journal.kept("reference-logits")["logits"].to(device), exact)


def _bit_equal(folder: Path, decided: Compressed) -> None:
    files = shard_files(folder)
    for name in decided.slices.keys() - decided.modules.keys():
        leaf = "weight" if "shape" in decided.slices[name] else "rotary_index"
        tensors = {}
        if f"{name}.{leaf}" in files:
            with safe_open(files[f"{name}.{leaf}"], framework="pt") as handle:
                tensors[leaf] = handle.get_tensor(f"{name}.{leaf}")
        if decided.digests[name] != digest(tensors):
            raise ProofError(f"{name}: the stored tensor is not the one that was decided; please report this")
    for name, spec in decided.modules.items():
        tensors = {}
        for leaf in layout(spec):
            key = f"{name}.{leaf}"
            if key not in files:
                raise ProofError(f"{key} was not written; please report this")
            with safe_open(files[key], framework="pt") as handle:
                tensors[leaf] = handle.get_tensor(key)
        again = pack(unpack(tensors, spec))
        if not decided.digests[name] == digest(tensors) == digest(again):
            raise ProofError(f"{name}: the stored weight is not the one that was decided; please report this")


def _skeleton(source: Source, decided: Compressed) -> Any:
    with torch.device("meta"):
        model = type(source.model)._from_config(copy.deepcopy(source.config), dtype=source.dtype).eval()
    materialise_buffers(model, source.device)
    replace_modules(model, decided.modules, decided.slices)
    return model


def _distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))


def _rounding(block: torch.nn.Module, packed: Sequence[Any], call: Call, hidden: torch.Tensor) -> float:
    """How far apart a block's outputs are with plain products of hidden's dtype: with the parts of each weight one
    after the other, and with the whole weight at once. What is wrong with the block is so with both."""
    linears: list[Any] = [module for module in packed if isinstance(module, PackedLinear)]
    found = []
    for form in (_whole, PackedLinear.canonical):
        try:
            for module in linears:
                module.forward = _plain(form(module), module.bias, hidden.dtype)
            with torch.no_grad():
                found.append(own_state([call])[0].run(block, hidden))
        finally:
            for module in linears:
                vars(module).pop("forward", None)
    return _distance(found[1], found[0])


def _whole(module: PackedLinear) -> Canonical:
    """Without parts, unless they round activations, which is no rounding of the product."""
    weight = module.canonical()
    return weight if rounds_input(module.spec) else Dense(weight.dequantize())


def _plain(weight: Canonical, bias: torch.Tensor | None, dtype: torch.dtype) -> Product:
    multiply = product(weight, dtype)
    return lambda x: multiply(x) if bias is None else multiply(x) + bias.to(x.dtype)


def compare_logits(found: torch.Tensor, reference: torch.Tensor, exact: bool) -> dict[str, float]:
    """Distances of logits (..., vocabulary). Raises ProofError beyond the limits.

    exact: float32 without rounded activations, where every logit has to be within 1e-3. Otherwise kernels may
    round a value to the other side of a boundary, and KL and relative distance are bounded instead.
    """
    found, reference = found.flatten(0, -2), reference.flatten(0, -2)
    largest, error, size, kl = torch.zeros(4, dtype=torch.float64, device=found.device)
    for rows, wanted in zip(found.split(_ROWS_AT_ONCE), reference.split(_ROWS_AT_ONCE), strict=True):
        rows, wanted = rows.double(), wanted.double()
        log_p, log_q = wanted.log_softmax(-1), rows.log_softmax(-1)
        largest = torch.maximum(largest, (rows - wanted).abs().max())
        error += (rows - wanted).square().sum()
        size += wanted.square().sum()
        kl += (log_p.exp() * (log_p - log_q)).sum()
    measured = {
        "max_abs": float(largest),
        "relative_l2": float((error / size.clamp(min=1e-30)).sqrt()),
        "kl": float(kl / len(found)),
    }
    limits = {"max_abs": LOGITS_FP32} if exact else {"kl": KL, "relative_l2": RELATIVE_L2}
    for name, limit in limits.items():
        if not measured[name] <= limit:
            raise ProofError(f"logits from disk differ from the reference: {name} {measured[name]:.2e} > {limit:.0e}")
    return measured
