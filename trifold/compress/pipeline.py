"""The main road: a model, a recipe and text in; a packed checkpoint or a packed model out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trifold.compress import checkpoint
from trifold.compress.account import card_of, fingerprint_of, quantization_of, report_of, stamp
from trifold.compress.allocate import allocate_shares, has_budget, with_shares
from trifold.compress.calibration import Calibration
from trifold.compress.card import NAME, front_of
from trifold.compress.compressed import Compressed
from trifold.compress.deliver import Delivery
from trifold.compress.estimate import check_room
from trifold.compress.files import parse_size
from trifold.compress.integration.load import load, read_compressed
from trifold.compress.integration.modules import install
from trifold.compress.job import Job, Options, room_of
from trifold.compress.journal import Follower, Journal, reference
from trifold.compress.preflight import prepare
from trifold.compress.processes import join, leave
from trifold.compress.progress import Reporter
from trifold.compress.proof import prove
from trifold.compress.recipe import Recipe
from trifold.compress.slicing import cuts, survey
from trifold.compress.source import LiveSource
from trifold.compress.summary import summarise
from trifold.compress.tensor_file import Entry
from trifold.compress.tune import ModelTuning
from trifold.compress.walk import Walk
from trifold.core.errors import InputError, ProofError


def compress_to(job: Job, output: Path) -> dict[str, Any]:
    """Write a packed checkpoint. `output` appears whole, by one rename, or not at all. Returns the report.

    Raises InputError, ProofError (unfinished output is removed), ResourceError (it stays, for the same
    command to go on).
    """
    if not job.processes.writes:
        _follow(job, output)
        return {}
    with checkpoint.locked(output):
        return _compress_to(job, output)


def _compress_to(job: Job, output: Path) -> dict[str, Any]:
    partial = output.with_name(output.name + ".partial")
    checkpoint.check_partial(partial)
    if job.options.fresh:
        checkpoint.discard(partial)
    fingerprint = fingerprint_of(job)
    with checkpoint.disk_errors(partial):
        report = checkpoint.finished_report(partial)
        if report is not None and report["fingerprint"] == stamp(fingerprint):
            job.report.notice("finished before; only the rename was missing")
            job.processes.same(False)
            checkpoint.discard(partial / "journal")
            checkpoint.publish(partial, output)
            return report
        if report is not None and not (partial / "journal").exists():
            raise InputError(f"{partial}: the finished result of another run; --fresh starts over, or move it away")
        journal = Journal(partial / "journal", fingerprint)
        job.processes.same(True)
        try:
            return _write(job, journal, partial, output)
        except (InputError, ProofError):
            checkpoint.discard(partial)
            raise
        finally:
            job.report.end()


def _write(job: Job, journal: Journal, partial: Path, output: Path) -> dict[str, Any]:
    started = time.perf_counter()
    source, everything = job.source, Compressed()
    source.open_outside()
    with Walk(job, room_of(job.options, journal.folder)) as walk:
        shares = _shares(walk, journal.noted("allocation"))
        if shares:
            journal.note("allocation", shares)
        if cuts(job.plan):
            walk.carries.update(_surveyed(walk, journal.noted("survey")))
            journal.note("survey", walk.carries)
        if walk.shares_state:
            journal.done = 0  # blocks read what earlier ones left in memory, so none can be skipped
        job.processes.same(journal.done)
        if journal.done:
            job.report.notice(f"going on after block {journal.done} of {source.block_count}")
            walk.resume(job.processes.same(journal.entry(journal.done - 1)["carries"]), journal.hidden())
        job.report.begin(source.block_count, journal.done)
        for index in range(journal.done, source.block_count):
            result = walk.block(index)
            journal.keep(reference(index), {"hidden": walk.hidden[0]})
            job.processes.wait()
            journal.write_block(index, result, walk.state(), walk.carries)
        for index in range(source.block_count):
            entry = journal.entry(index)
            everything.note(entry["modules"], entry["report"], entry["digests"], entry["slices"])
        tail, logits = walk.tail()
        everything.note(tail.modules, tail.report, tail.digests)
        journal.keep("reference-logits", {"logits": logits})
        job.report.end()
        tuned = _tuned(walk, journal, everything)

    def units() -> Iterator[Mapping[str, Entry]]:
        for index in range(source.block_count):
            yield journal.block_tensors(index) if tuned is None else tuned[index]
        yield {name: Entry.of(tensor) for name, tensor in tail.tensors.items()}

    checkpoint.write_shards(partial, units(), parse_size(job.options.max_shard_size, "--max-shard-size"))
    source.copy_files(partial)
    front = front_of(partial)
    checkpoint.write_config(partial, source.config_dict() | {"dtype": job.dtype_name}, quantization_of(job, everything))
    tail.tensors.clear()
    source.close_outside()
    job.report.notice("proving the round trip")
    proof = prove(partial, everything, journal, job.ids[0], source)
    sizes = {name: value for name, value in summarise(partial).items() if name != "layers"}
    report = report_of(job, everything, sizes, proof, time.perf_counter() - started)
    report["fingerprint"] = stamp(fingerprint_of(job))
    (partial / NAME).write_text(card_of(job, report, front), encoding="utf-8")
    checkpoint.write_report(partial, report)  # last: with it the run counts as finished
    journal.remove()
    checkpoint.publish(partial, output)
    return report


def _shares(walk: Walk, noted: Mapping[str, float] | None) -> Mapping[str, float]:
    """What is divided among layers first, and put into the plan. noted: what was found before the run broke off."""
    job = walk.job
    if not has_budget(job.plan):
        return {}
    shares: Mapping[str, float] = job.processes.same(noted) or job.processes.same(allocate_shares(walk))
    job.plan = with_shares(job.plan, shares)
    return shares


def _surveyed(walk: Walk, noted: dict[str, Any] | None) -> dict[str, Any]:
    """How the budget of dimensions is divided. noted: what was found before the run broke off."""
    found: dict[str, Any] = walk.job.processes.same(noted) or survey(walk)
    return found


def _follow(job: Job, output: Path) -> None:
    """Take part in the compression that the first process writes."""
    if not job.processes.same(None):
        return
    folder = output.with_name(output.name + ".partial") / "journal"
    with checkpoint.disk_errors(folder):
        job.source.open_outside()
        with Walk(job, room_of(job.options, folder)) as walk:
            _shares(walk, None)
            if cuts(job.plan):
                walk.carries.update(_surveyed(walk, None))
            journal = Follower(folder, job.processes.rank, job.processes.same(None))
            if journal.done:
                walk.resume(job.processes.same(None), journal.hidden())
            for index in range(journal.done, job.source.block_count):
                walk.block(index)
                journal.write_block(index, walk.state())
                job.processes.wait()
            walk.tail()


def _tuned(walk: Walk, journal: Journal, everything: Compressed) -> list[dict[str, Entry]] | None:
    """Run the recipe's tuners of the whole model: the tensors of each block, or None if there are none."""
    tuners = [entry for entry in walk.job.plan.tuners if entry[1].level == "model"]
    if not tuners:
        return None
    tuning = ModelTuning(walk, journal, everything)
    for step, tuner, names in tuners:
        tuning.tune(step, tuner, sorted(names & set(everything.modules)))
    tuning.finish()
    return tuning.tensors


def compress_live(job: Job) -> dict[str, Any]:
    """Replace the linears of a live model by packed ones: at the end, or with `inplace` block by block."""
    started, source, everything = time.perf_counter(), job.source, Compressed()
    results = []
    job.report.begin(source.block_count, 0)
    try:
        with Walk(job, room_of(job.options)) as walk:
            if has_budget(job.plan):
                job.plan = with_shares(job.plan, allocate_shares(walk))
            if cuts(job.plan):
                walk.carries.update(survey(walk))
            for index in range(source.block_count):
                results.append(walk.block(index))
                everything.note(results[-1].modules, results[-1].report, results[-1].digests, results[-1].slices)
                if job.options.inplace:
                    install(source.model, results.pop())
            results.append(walk.tail()[0])
            everything.note(results[-1].modules, results[-1].report, results[-1].digests)
    finally:
        job.report.end()
    for result in results:
        install(source.model, result)
    _mark(job, checkpoint.quantization_block(quantization_of(job, everything)))
    return report_of(job, everything, {}, {}, time.perf_counter() - started)


def _mark(job: Job, quantization: dict[str, Any]) -> None:
    """Make a live model one that `save_pretrained` writes as ours."""
    from trifold.compress.integration.quantizer import TrifoldConfig, TrifoldQuantizer

    config = TrifoldConfig(**quantization)
    job.source.model.config.quantization_config = config
    job.source.model.hf_quantizer = TrifoldQuantizer(config, pre_quantized=True)
    job.source.model.is_quantized = True


def run(
    model: Any,
    recipe: Recipe,
    calibration: Calibration | None,
    output: Path | None,
    options: Options,
    report: Reporter,
    tokenizer: Any = None,
    delivery: Delivery | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Compress to a folder (returns None and the report) or into a model (returns it and the report)."""
    if output is not None:
        checkpoint.check_output(output)
    if delivery:
        delivery.begin(output)
    processes = join()
    if not processes.writes:
        report.level = -1
    job = prepare(model, recipe, calibration, options, report, tokenizer, processes)
    if processes.size > 1:
        _check_processes(job, output)
    if delivery and output is not None:
        delivery.check(job, output)
        job.repository = delivery.repository
    if isinstance(job.source, LiveSource):
        whole = [step for step, tuner, _ in job.plan.tuners if tuner.level == "model"]
        if whole and output is None:
            raise InputError(f"step {whole[0]!r} tunes a whole model, which a live one does not become; give an output")
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            model.trifold_report = _run_live(job, output)
            if delivery and output is not None:
                model.trifold_report |= delivery.finish(output, options)
            return model, model.trifold_report
        finally:
            for module in training:
                module.training = True
    if output is not None:
        if processes.writes:
            check_room(job, output)
        written = compress_to(job, output)
        leave()
        if delivery and processes.writes:
            written |= delivery.finish(output, options)
        return None, written
    with tempfile.TemporaryDirectory() as folder:
        written = compress_to(job, Path(folder) / "model")
        trust = {"trust_remote_code": True} if options.trust_remote_code else {}
        packed = load(Path(folder) / "model", job.source.dtype, {"": job.source.device}, **trust)
    packed.trifold_report = written
    return packed, written


def _check_processes(job: Job, output: Path | None) -> None:
    if output is None or isinstance(job.source, LiveSource):
        raise InputError("several processes compress a folder into a folder; start one for a model in memory")
    if job.plan.tuners:
        raise InputError(f"step {job.plan.tuners[0][0]!r} tunes in one process; start one")


def _run_live(job: Job, output: Path | None) -> dict[str, Any]:
    if output is None:
        return compress_live(job)
    report = compress_to(job, output)
    install(job.source.model, read_compressed(output))
    _mark(job, json.loads((output / "config.json").read_text())["quantization_config"])
    return report
