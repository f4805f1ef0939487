"""Whether what a recipe will make can be exported: known before anything is compressed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trifold.compress.export import check_format, choose_plan
from trifold.compress.export_gguf import GgufPlan, check_tokenizer
from trifold.compress.folder import FolderSource, meta_model
from trifold.compress.job import Job
from trifold.compress.packed_folder import PackedFolder
from trifold.compress.tensor_file import Entry
from trifold.core.canonical import Canonical, Quantized, RoundedInput, with_rounded_input
from trifold.core.errors import InputError
from trifold.formats import describe
from trifold.kernels import is_stacked


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
    with in_words_of_compress():
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
    dense = meta_model(config, dtype, output, job.options.trust_remote_code)
    stacks = [f"{path}." for path, module in dense.named_modules() if is_stacked(module)]
    apart = tuple(path for path in stacks if any(name.startswith(path) for name in weights))
    state = dense.state_dict()
    tied = set(getattr(job.source.model, "all_tied_weights_keys", None) or ())
    planned = Planned(
        folder=output,
        config=job.source.config_dict(),
        method="trifold",
        modules={name: describe(weight) for name, weight in weights.items()},
        tensors={
            name: Entry.of(tensor)
            for name, tensor in state.items()
            if name not in without | tied and not name.startswith(apart)
        },
        weights=weights,
    )

    def skeleton() -> object:
        return meta_model(config, dtype, output, job.options.trust_remote_code)

    with in_words_of_compress():
        chosen, plan = choose_plan(planned, to, host, skeleton, again=False)
    if isinstance(plan, GgufPlan) and isinstance(job.source, FolderSource):
        check_tokenizer(plan, job.source.folder)
    elif isinstance(plan, GgufPlan):
        with tempfile.TemporaryDirectory() as folder:
            job.source.copy_files(Path(folder))
            check_tokenizer(plan, Path(folder))
    return chosen


@contextmanager
def in_words_of_compress() -> Iterator[None]:
    """Errors of an export speak of its own options, and of zero-points that it has seen."""
    try:
        yield
    except InputError as error:
        text = str(error).replace(", and --requantize rounds it again", "").replace("--to ", "--export-to ")
        raise type(error)(text.replace("it has a zero-point of 0", "it may get a zero-point of 0")) from error


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
