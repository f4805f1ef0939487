"""The functions of the public API: `compress`, `load`, `evaluate`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
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
    **options: Any,
) -> Any:
    """Compress a causal language model.

    model: a folder, a hub id, or a live transformers model, which is changed only at completion unless
    `inplace=True` saves memory. recipe: a preset name, a YAML file, a mapping or a `Recipe`. calibration: a
    .jsonl or text file, a dataset name, or an iterable of texts or token ids; not needed if the recipe is
    data-free. output: a folder that must not exist yet; None keeps the result in memory.
    options: batch_size, dtype ("auto", "float32", ...), device, max_shard_size, fresh, inplace.

    Returns the compressed model, ready to run, its report at `model.trifold_report`; with `output`, and a folder
    or hub id as the model, the report (a dict) instead. Raises InputError, ProofError or
    ResourceError; see `trifold.core.errors`.
    """
    from trifold.compress.pipeline import Options, run
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
    result, report = run(model, chosen, calibration, folder, Options(**options), Reporter(verbosity), tokenizer)
    return report if result is None else result


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
    batch_size: int = 1,
    speed: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """Perplexity on a text; KL and top-1 agreement against a baseline; decode speed and memory.

    model, baseline: live models, folders or hub ids. text: a file, a dataset name, or an iterable of texts or
    token ids. Returns an `EvalReport`. Raises InputError.
    """
    from trifold.compress.calibration import text_windows
    from trifold.eval import evaluate as score

    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if tokenizer is None and isinstance(model, str | os.PathLike):
        needed = isinstance(text, str | os.PathLike)
        with contextlib.nullcontext() if needed else contextlib.suppress(CheckpointError):
            tokenizer = load_tokenizer(model, **trust)
    model = load(model, dtype=dtype, **trust) if isinstance(model, str | os.PathLike) else model
    windows = text_windows(text, tokenizer, model.config, max_windows, seqlen, stride, option="--text")
    baseline = load(baseline, dtype=dtype, **trust) if isinstance(baseline, str | os.PathLike) else baseline
    return score(model, windows, baseline, speed=speed, batch_size=batch_size)


__all__ = ["compress", "evaluate", "load", "load_tokenizer"]
