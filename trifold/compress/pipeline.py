"""The main road: a model, a recipe and text in; a packed checkpoint or a packed model out."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trifold.compress import checkpoint
from trifold.compress.block import BlockCompressor, Compressed, dense_tensors
from trifold.compress.calibration import (
    PROOF_WINDOWS,
    Calibration,
    default_batch_size,
    random_windows,
    text_windows,
)
from trifold.compress.capture import Call, Captured, Tail, capture_calls
from trifold.compress.integration.load import load, read_compressed
from trifold.compress.integration.modules import install
from trifold.compress.journal import Journal
from trifold.compress.plan import Plan, make_plan
from trifold.compress.progress import Reporter, resident_bytes
from trifold.compress.proof import prove
from trifold.compress.recipe import Recipe
from trifold.compress.runner import BlockRunner
from trifold.compress.source import FolderSource, LiveSource, Source, model_folder
from trifold.compress.summary import summarise
from trifold.compress.text import Windows, batches
from trifold.core.errors import CalibrationError, InputError, ProofError
from trifold.core.linears import linears
from trifold.core.topology import Topology, topology_of
from trifold.core.version import VERSION


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to do."""

    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_shard_size: str = "5GB"
    fresh: bool = False
    inplace: bool = False
    trust_remote_code: bool = False


@dataclass
class Job:
    """A compression that passed its preflight."""

    source: Source
    recipe: Recipe
    plan: Plan
    windows: Windows
    observed: bool
    topology: Topology
    batch_size: int
    options: Options
    report: Reporter

    @cached_property
    def ids(self) -> list[torch.Tensor]:
        """Batches of token ids; the first is small, since it is also the one that the proof runs."""
        few = replace(self.windows, ids=self.windows.ids[:PROOF_WINDOWS])
        rest = replace(self.windows, ids=self.windows.ids[PROOF_WINDOWS:])
        return [*batches(few, self.batch_size), *batches(rest, self.batch_size)]


def prepare(
    model: Any,
    recipe: Recipe,
    calibration: Calibration | None,
    options: Options,
    report: Reporter,
    tokenizer: Any = None,
) -> Job:
    """Everything that can be found wrong before anything is written. Raises InputError."""
    if isinstance(model, str | Path):
        folder = model_folder(model)
        name = folder.name if Path(model).expanduser().is_dir() else str(model)
        source: Source = FolderSource(folder, name, options.dtype, options.trust_remote_code, _device(options.device))
    else:
        source = LiveSource(model, tokenizer, options.inplace)
    plan = make_plan(recipe, source.model, source.blocks)
    if calibration is None:
        if not recipe.data_free:
            raise CalibrationError(f"recipe {recipe.name!r} needs calibration text; give it with --calib FILE")
        windows = random_windows(source.config, recipe.seed)
    else:
        windows = text_windows(calibration, source.tokenizer, source.config, recipe.nsamples, recipe.seqlen)
    config = source.config.get_text_config()
    topology = topology_of(config.model_type, getattr(config, "head_dim", None) or _head_dim(config))
    for notice in windows.notices:
        report.notice(notice)
    if plan.rewrites and not topology.folds:
        report.notice(
            f"{config.model_type}: no folds are known for this family, so "
            f"{', '.join(step for step, _, _ in plan.rewrites)} only searches ranges"
        )
    source.check_finite()
    size = options.batch_size or default_batch_size(windows)
    return Job(source, recipe, plan, windows, calibration is not None, topology, size, options, report)


def compress_to(job: Job, output: Path) -> dict[str, Any]:
    """Write a packed checkpoint. `output` appears whole, by one rename, or not at all. Returns the report.

    Raises InputError, ProofError (unfinished output is removed), ResourceError (it stays, for the same
    command to go on).
    """
    partial = output.with_name(output.name + ".partial")
    checkpoint.check_partial(partial)
    if job.options.fresh:
        checkpoint.discard(partial)
    max_shard = checkpoint.parse_size(job.options.max_shard_size)
    with checkpoint.disk_errors(partial):
        journal = Journal(partial / "journal", _fingerprint(job))
        try:
            return _write(job, journal, partial, output, max_shard)
        except (InputError, ProofError):
            checkpoint.discard(partial)
            raise
        finally:
            job.report.end()


def _write(job: Job, journal: Journal, partial: Path, output: Path, max_shard: int) -> dict[str, Any]:
    started = time.perf_counter()
    source, everything = job.source, Compressed()
    source.open_outside()
    walk = _Walk(job)
    if journal.done:
        job.report.notice(f"going on after block {journal.done} of {source.block_count}")
        walk.resume([journal.entry(i) for i in range(journal.done)], journal.hidden())
    job.report.begin(source.block_count, journal.done)
    for index in range(journal.done, source.block_count):
        result = walk.block(index)
        journal.keep(f"reference-{index:05d}", {"hidden": walk.hidden[0]})
        journal.write_block(index, result, [*walk.hidden, *walk.dense], walk.carries)
    for index in range(source.block_count):
        _merge(everything, journal.entry(index))
    tail, logits = walk.tail()
    _merge(everything, vars(tail))
    journal.keep("reference-logits", {"logits": logits})
    job.report.end()

    def units() -> Iterator[Mapping[str, torch.Tensor]]:
        for index in range(source.block_count):
            yield journal.block_tensors(index)
        yield tail.tensors

    for stale in partial.glob("*.safetensors"):
        stale.unlink()
    checkpoint.write_shards(partial, units(), max_shard)
    source.copy_files(partial)
    checkpoint.write_config(
        partial, source.config_dict() | {"dtype": _dtype_name(source)}, _quantization(job, everything)
    )
    job.report.notice("proving the round trip")
    proof = prove(partial, everything, journal, job.ids[0], source)
    sizes = {name: value for name, value in summarise(partial).items() if name != "layers"}
    report = _report(job, everything, sizes, proof, time.perf_counter() - started)
    checkpoint.write_report(partial, report)
    journal.remove()
    checkpoint.publish(partial, output)
    return report


def compress_live(job: Job) -> dict[str, Any]:
    """Replace the linears of a live model by packed ones: at the end, or with `inplace` block by block."""
    started, source, everything = time.perf_counter(), job.source, Compressed()
    walk = _Walk(job)
    job.report.begin(source.block_count, 0)
    try:
        results = []
        for index in range(source.block_count):
            results.append(walk.block(index))
            if job.options.inplace:
                install(source.model, results.pop(), everything)
        results.append(walk.tail()[0])
    finally:
        job.report.end()
    for result in results:
        install(source.model, result, everything)
    _mark(job, checkpoint.quantization_block(_quantization(job, everything)))
    return _report(job, everything, {}, {}, time.perf_counter() - started)


def _mark(job: Job, quantization: dict[str, Any]) -> None:
    """Make a live model one that `save_pretrained` writes as ours."""
    from trifold.compress.integration.quantizer import TrifoldConfig, TrifoldQuantizer

    config = TrifoldConfig(**quantization)
    job.source.model.config.quantization_config = config
    job.source.model.hf_quantizer = TrifoldQuantizer(config, pre_quantized=True)
    job.source.model.is_quantized = True


class _Walk:
    """Block after block: hidden states in, hidden states out."""

    def __init__(self, job: Job) -> None:
        self.job, source = job, job.source
        self.blocks = source.model.get_submodule(source.blocks)
        self.carries: dict[str, Any] = {}
        self.captured: list[Captured] = [
            capture_calls(source.model, self.blocks, ids.to(source.device)) for ids in job.ids
        ]
        self.hidden = [captured.hidden for captured in self.captured]
        self.dense = list(self.hidden) if job.plan.follows_dense else []
        self.finished = 0

    def resume(self, entries: list[dict[str, Any]], hidden: list[torch.Tensor]) -> None:
        """Take up the states behind the last finished block."""
        self.carries, count = entries[-1]["carries"], len(self.hidden)
        hidden = [states.to(self.job.source.device) for states in hidden]
        self.hidden, self.dense = hidden[:count], hidden[count:]

    def block(self, index: int) -> Compressed:
        """Compress one block and step the hidden states over it."""
        job, source = self.job, self.job.source
        prefix = f"{source.blocks}.{index}."
        block = source.open_block(index)
        targets = {n: m for n, m in linears(block).items() if prefix + n in job.plan.layers}
        runner = BlockRunner(block, targets, [c.calls[index] for c in self.captured], self.hidden)
        compressor = BlockCompressor(block, prefix, job.plan, runner, job.observed, job.report.layer)
        compressor.rewrite(job.topology, self.carries)
        dense = compressor.follow_dense(self.dense) if self.dense else None
        result = compressor.solve(job.recipe.true_sequential)
        self.hidden, self.dense = runner.outputs(), dense.outputs() if dense else []
        result.tensors.update(dense_tensors(block, prefix, result.modules))
        source.close_block(index)
        self.finished += 1
        errors = [entry["error"] for entry in result.report.values()]
        job.report.block(index, source.block_count, self.finished, sum(errors) / max(len(errors), 1))
        return result

    def tail(self) -> tuple[Compressed, torch.Tensor]:
        """Compress what the recipe addresses behind the blocks; the reference logits of the first batch."""
        job, source = self.job, self.job.source
        tail = Tail(source.model, self.blocks, self.captured[0].as_tuple)
        prefix = source.blocks + "."
        outside = {n: m for n, m in linears(source.model).items() if n in job.plan.layers}
        outside = {n: m for n, m in outside.items() if not n.startswith(prefix)}
        calls = [Call((ids.to(source.device),), {}, True) for ids in job.ids]
        result = Compressed()
        if outside:
            runner = BlockRunner(tail, outside, calls, self.hidden)
            compressor = BlockCompressor(tail, "", job.plan, runner, job.observed, job.report.layer)
            compressor.dense = BlockRunner(tail, outside, calls, self.dense) if self.dense else None
            result = compressor.solve(False)
        with torch.no_grad():
            logits = calls[0].run(tail, self.hidden[0])
        tied = getattr(source.model, "all_tied_weights_keys", None) or {}
        for name, tensor in dense_tensors(source.model, "", result.modules).items():
            if not name.startswith(prefix) and name not in tied:
                result.tensors[name] = tensor
        return result, logits


def _merge(everything: Compressed, entry: Mapping[str, Any]) -> None:
    everything.modules.update(entry["modules"])
    everything.report.update(entry["report"])
    everything.digests.update(entry["digests"])


def _quantization(job: Job, everything: Compressed) -> dict[str, Any]:
    return {"recipe": job.recipe.to_dict(), "base_model": job.source.name, "modules": everything.modules}


def _fingerprint(job: Job) -> dict[str, Any]:
    return {
        "recipe": job.recipe.to_dict(),
        "source": job.source.fingerprint(),
        "dtype": _dtype_name(job.source),
        "calibration": job.windows.digest if job.observed else None,
        "batch_size": job.batch_size,
        "threads": torch.get_num_threads(),
        "max_shard_size": job.options.max_shard_size,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What the result may depend on."""
    libraries = ("torch", "transformers", "safetensors")
    return {"trifold": VERSION, **{name: importlib.metadata.version(name) for name in libraries}}


def _report(
    job: Job, everything: Compressed, sizes: Mapping[str, Any], proof: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "recipe": job.recipe.to_dict(),
        "base_model": job.source.name,
        "calibration": {
            "source": job.windows.source,
            "digest": job.windows.digest,
            "windows": len(job.windows.ids),
            "seqlen": job.windows.seqlen,
            "tokens": job.windows.total_tokens,
            "bos": job.windows.bos,
            "notices": list(job.windows.notices),
        }
        if job.observed
        else None,
        "seed": job.recipe.seed,
        "batch_size": job.batch_size,
        "dtype": _dtype_name(job.source),
        "versions": versions(),
        "layers": everything.report,
        "mean_error": sum(e["error"] for e in everything.report.values()) / len(everything.report),
        **sizes,
        "proof": dict(proof),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": resident_bytes(),
    }


def _dtype_name(source: Source) -> str:
    return str(source.dtype).removeprefix("torch.")


def _head_dim(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    return config.hidden_size // heads if heads else 0


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(
    model: Any,
    recipe: Recipe,
    calibration: Calibration | None,
    output: Path | None,
    options: Options,
    report: Reporter,
    tokenizer: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Compress to a folder (returns None and the report) or into a model (returns it and the report)."""
    if output is not None:
        checkpoint.check_output(output)
    job = prepare(model, recipe, calibration, options, report, tokenizer)
    if isinstance(job.source, LiveSource):
        training = model.training
        model.eval()
        try:
            return model, _run_live(job, output)
        finally:
            model.train(training)
    if output is not None:
        return None, compress_to(job, output)
    with tempfile.TemporaryDirectory() as folder:
        written = compress_to(job, Path(folder) / "model")
        return load(Path(folder) / "model", job.source.dtype, {"": job.source.device}), written


def _run_live(job: Job, output: Path | None) -> dict[str, Any]:
    if output is None:
        return compress_live(job)
    report = compress_to(job, output)
    install(job.source.model, read_compressed(output), Compressed())
    _mark(job, json.loads((output / "config.json").read_text())["quantization_config"])
    return report
