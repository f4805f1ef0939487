"""The functions of the public API: `compress`, `load`, `evaluate`, `evaluate_tasks`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from trifold.compress.integration.load import load, load_tokenizer
from trifold.core.errors import CheckpointError, InputError


def compress(
    model: Any,
    recipe: Any = "w4a16-gptq",
    calibration: str | os.PathLike[str] | Iterable[Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    settings: Iterable[str] = (),
    verbosity: int = 0,
    export_to: str | None = None,
    engine: str | None = None,
    push_to_hub: str | None = None,
    **options: Any,
) -> Any:
    """Compress a causal language model.

    model: a folder, a hub id, or a live transformers model, which is changed only at completion unless
    `inplace=True` saves memory. recipe: a preset name, a YAML file, a mapping or a `Recipe`. calibration: a
    .jsonl or text file, a dataset name, or an iterable of texts or token ids; not needed if the recipe is
    data-free. output: a folder that must not exist yet; None keeps the result in memory. export_to, engine: as of
    `export`, whose output goes beside it, to `OUTPUT-FORMAT`; whether it can is known before anything is compressed.
    push_to_hub: a repository that the export is uploaded to, or without one the checkpoint.
    options: batch_size, dtype ("auto", "float32", ...), device, max_shard_size, fresh, inplace.

    Returns the compressed model, ready to run, its report at `model.trifold_report`; with `output`, and a folder
    or hub id as the model, the report (a dict) instead. Raises InputError, ProofError or
    ResourceError; see `trifold.core.errors`.
    """
    from trifold.compress.deliver import Delivery
    from trifold.compress.job import Options
    from trifold.compress.pipeline import run
    from trifold.compress.progress import Reporter
    from trifold.compress.recipe import Recipe

    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        raise InputError(
            f"compress: unknown option {sorted(unknown)[0]!r}; known: {', '.join(Options.__dataclass_fields__)}"
        )
    chosen = Recipe.load(recipe).updated(settings)
    wanted = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed}
    chosen = chosen.updated([f"{k}={v}" for k, v in wanted.items() if v is not None])
    folder = None if output is None else Path(output).expanduser()
    delivery, reporter = Delivery(export_to, engine, push_to_hub), Reporter(verbosity)
    result, report = run(model, chosen, calibration, folder, Options(**options), reporter, tokenizer, delivery)
    return report if result is None else result


def export(
    model: str | os.PathLike[str],
    to: str | None,
    output: str | os.PathLike[str],
    *,
    engine: str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = "5GB",
    requantize: bool = False,
    evaluation: str | os.PathLike[str] | None = None,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a compressed checkpoint as another engine loads it, without changing a code.

    model: a folder or hub id, of Trifold, compressed-tensors, GPTQ or AWQ. to: "compressed-tensors", "pack-quantized",
    "int-quantized", "float-quantized", "gptq", "gptq_v2", "awq", "gguf" or "dense"; None chooses the best one for
    `engine`. output: a folder, or with "gguf" a file that ends so, that must not exist yet. engine: "vllm", "sglang",
    "transformers", "gptqmodel" or "llama.cpp": check that it runs every layer. dtype: with "dense", of the weights.
    requantize: round what the format cannot hold a second time, and report by how much. evaluation: a file that
    `trifold eval --json` wrote, for the model card. push_to_hub: a repository to upload the output to. Returns the
    report. Raises InputError, before anything is written, for a layer that the format cannot hold exactly, or that the
    engine does not run.
    """
    from trifold.compress.export import export as write

    return write(
        model,
        to,
        output,
        engine=engine,
        dtype=dtype,
        max_shard_size=max_shard_size,
        requantize=requantize,
        evaluation=evaluation,
        push_to_hub=push_to_hub,
        trust_remote_code=trust_remote_code,
    )


def evaluate(
    model: Any,
    text: str | os.PathLike[str] | Iterable[Any],
    baseline: Any = None,
    *,
    tokenizer: Any = None,
    seqlen: int = 2048,
    max_windows: int | None = None,
    stride: int | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int | str = "auto",
    speed: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """Perplexity on a text; KL and top-1 agreement against a baseline; decode speed and memory.

    model, baseline: live models, folders or hub ids. text: a file, a dataset name, or an iterable of texts or
    token ids. batch_size: windows; "auto" is about 1024 tokens. Returns an `EvalReport`. Raises InputError.
    """
    from trifold.compress.calibration import default_batch_size, text_windows
    from trifold.eval import evaluate as score

    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if tokenizer is None and isinstance(model, str | os.PathLike):
        needed = isinstance(text, str | os.PathLike)
        with contextlib.nullcontext() if needed else contextlib.suppress(CheckpointError):
            tokenizer = load_tokenizer(model, **trust)
    model = _loaded(model, dtype, trust)
    windows = text_windows(text, tokenizer, model.config, max_windows, seqlen, stride, option="--text")
    size = default_batch_size(windows) if isinstance(batch_size, str) else batch_size
    return score(model, windows, _loaded(baseline, dtype, trust), speed=speed, batch_size=size)


def evaluate_tasks(
    model: Any,
    tasks: Any,
    baseline: Any = None,
    *,
    tokenizer: Any = None,
    tasks_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = "auto",
    seed: int | None = None,
    bootstrap_iters: int = 100_000,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Any:
    """lm-eval's tasks, on a model and, with a baseline, on both, with their paired differences.

    model, baseline: live models, folders or hub ids. tasks: the name of a task, group or tag, a YAML file, a folder
    of them, a list of these, or what `trifold.eval.resolve_tasks` made of them. tokenizer: of the model; one that was
    loaded from a folder brings its own. The other options are those of `trifold.eval.evaluate_tasks`. Returns a
    `TaskReport`. Raises InputError, before a model is loaded if it is for the tasks.
    """
    from trifold.eval import Tasks, resolve_tasks
    from trifold.eval import evaluate_tasks as score

    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    named = [tasks] if isinstance(tasks, str | os.PathLike) else tasks
    paths = [tasks_path] if isinstance(tasks_path, str | os.PathLike) else tasks_path
    chosen = tasks if isinstance(tasks, Tasks) else resolve_tasks(named, paths, progress)
    model = _loaded(model, dtype, trust)
    baseline = _loaded(baseline, dtype, trust)
    own = [None if each is None else _own_tokenizer(each, trust) for each in (model, baseline)]
    tokenizer = own[0] if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InputError("the model was not loaded from a folder with a tokenizer; give tokenizer=")
    return score(
        model,
        tokenizer,
        chosen,
        baseline,
        own[1],
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        bootstrap_iters=bootstrap_iters,
        progress=progress,
    )


def _loaded(model: Any, dtype: str | torch.dtype, trust: dict[str, Any]) -> Any:
    return load(model, dtype=dtype, **trust) if isinstance(model, str | os.PathLike) else model


def _own_tokenizer(model: Any, trust: dict[str, Any]) -> Any:
    """The tokenizer of where a model was loaded from; None if there is none."""
    with contextlib.suppress(CheckpointError):
        return load_tokenizer(getattr(model, "name_or_path", ""), **trust)
    return None


__all__ = ["compress", "evaluate", "evaluate_tasks", "export", "load", "load_tokenizer"]
