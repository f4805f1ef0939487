"""Everything that can be found wrong with a compression before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trifold.compress.calibration import (
    CALIBRATION_TOKENS,
    TOKENS_PER_BATCH,
    Calibration,
    default_batch_size,
    random_windows,
    text_windows,
)
from trifold.compress.files import model_folder, parse_size
from trifold.compress.folder import FolderSource
from trifold.compress.job import Job, Options, room_of
from trifold.compress.lint import lint
from trifold.compress.plan import make_plan
from trifold.compress.processes import ALONE, Processes
from trifold.compress.progress import Reporter
from trifold.compress.recipe import Recipe
from trifold.compress.slicing import check_known
from trifold.compress.source import LiveSource, Source
from trifold.core.errors import CalibrationError, InputError
from trifold.core.families import topology_of


def prepare(
    model: Any,
    recipe: Recipe,
    calibration: Calibration | None,
    options: Options,
    report: Reporter,
    tokenizer: Any = None,
    processes: Processes = ALONE,
) -> Job:
    """Everything that can be found wrong before anything is written. Raises InputError."""
    parse_size(options.max_shard_size, "--max-shard-size")
    room_of(options)
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"batch_size={options.batch_size}: must be at least 1")
    if isinstance(model, str | Path):
        folder = model_folder(model)
        name = folder.resolve().name if Path(model).expanduser().is_dir() else str(model)
        source: Source = FolderSource(folder, name, options.dtype, options.trust_remote_code, _device(options.device))
    elif options.dtype != "auto" or options.device != "auto":
        raise InputError("dtype and device are the model's own for a live model; move or cast it before")
    else:
        source = LiveSource(model, tokenizer, options.inplace)
    plan = make_plan(recipe, source.model, source.blocks)
    if calibration is None:
        if not recipe.data_free:
            why = "needs calibration text"
            if recipe.has_static_inputs:
                why += " for its static activation scales (input.static=false finds them at run time)"
            raise CalibrationError(f"recipe {recipe.name!r} {why}; give it with --calib FILE")
        windows, more = random_windows(source.config, recipe.seed), None
    else:
        limit = recipe.nsamples * (1 + recipe.more_text)
        windows = text_windows(calibration, source.tokenizer, source.config, limit, recipe.seqlen)
        windows, more = windows.divided(recipe.nsamples)
        found = lint(windows, plan, source.tokenizer, source.name)
        windows = replace(windows, notices=(*windows.notices, *found))
    config = source.config.get_text_config()
    topology = topology_of(config)
    for notice in (*source.notices, *plan.notices, *windows.notices):
        report.notice(notice)
    check_known({step: method for step, method, _ in plan.rewrites}, topology.dimensions, config.model_type)
    scaling = [step for step, method, _ in plan.rewrites if not method.cuts]
    if scaling and not topology.folds:
        report.notice(
            f"{config.model_type}: no folds are known for this family, so "
            f"{', '.join(scaling)} cannot scale anything there"
        )
    if processes.writes:
        source.check_finite()
    tokens = CALIBRATION_TOKENS.get(torch.device(source.device).type, TOKENS_PER_BATCH)
    size = options.batch_size or default_batch_size(windows, tokens)
    job = Job(source, recipe, plan, windows, more, calibration is not None, topology, size, options, report, processes)
    if job.observed and len(job.batches) < processes.size:
        raise CalibrationError(
            f"{windows.source}: {len(job.batches)} batches for {processes.size} processes; start fewer, or give "
            "--batch-size 1"
        )
    return job


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
