"""Whether what a recipe will make can be exported: known before anything is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trifold.compress.export import check_format, choose_plan
from trifold.compress.folder import meta_model
from trifold.compress.job import Job
from trifold.compress.packed_folder import PackedFolder
from trifold.compress.tensor_file import Entry
from trifold.core.canonical import Canonical, Quantized, RoundedInput, with_rounded_input
from trifold.core.errors import InputError
from trifold.formats import describe


@dataclass(frozen=True)
class Planned(PackedFolder):
    """A checkpoint that is not there yet. weights: of each layer what stands for it, without codes."""

    weights: Mapping[str, Canonical]

    def weight(self, name: str, codes: bool = True) -> Canonical:
        return self.weights[name]


def check_export(job: Job, to: str | None, engine: str | None, output: Path) -> str:
    """The format that a compression's result will be exported to.

    Raises InputError for the first layer that the format cannot hold or the engine not run. What depends on the data
    passes here: scales beyond float16, outliers that a method finds.
    """
    host = check_format(to, engine)
    cut = next((step for step, method, _ in job.plan.rewrites if method.cuts), None)
    if cut is not None:
        raise InputError(f"step {cut!r} cuts dimensions, to sizes that no other layout can say; leave the export out")
    weights = {}
    for name, layer in job.plan.layers.items():
        try:
            found = layer.method.sketch(layer.shape, layer.scheme)
        except NotImplementedError:
            continue  # nobody can tell before it has run
        if layer.input is not None:
            found = with_rounded_input(found, layer.input, torch.ones(layer.shape[1]) if layer.input.static else None)
        weights[name] = _filled(found)
    config, dtype = job.source.config, job.source.dtype
    without = {f"{name}.weight" for name in weights}
    state = meta_model(config, dtype, output, job.options.trust_remote_code).state_dict()
    tied = set(getattr(job.source.model, "all_tied_weights_keys", None) or ())
    planned = Planned(
        folder=output,
        config=job.source.config_dict(),
        method="trifold",
        modules={name: describe(weight) for name, weight in weights.items()},
        tensors={name: Entry.of(tensor) for name, tensor in state.items() if name not in without | tied},
        weights=weights,
    )

    def skeleton() -> object:
        return meta_model(config, dtype, output, job.options.trust_remote_code)

    return choose_plan(planned, to, host, skeleton, again=False)[0]


def _filled(weight: Canonical) -> Canonical:
    """With scales that need every bit of their dtype, and zero-points at both ends, since any may occur."""
    if isinstance(weight, RoundedInput):
        return replace(weight, weight=_filled(weight.weight))
    if not isinstance(weight, Quantized):
        return weight
    scale = torch.full(weight.scale.shape, 1 + torch.finfo(weight.scale.dtype).eps, dtype=weight.scale.dtype)
    if weight.zero_point is None or weight.scheme.zero_point == "real":
        return replace(weight, scale=scale)
    ends = torch.arange(scale.numel()).remainder(2).mul(weight.scheme.max_code)
    return replace(weight, scale=scale, zero_point=ends.to(torch.uint8).reshape(scale.shape))
