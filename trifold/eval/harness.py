"""lm-eval's tasks on models that are already loaded, and how far two models differ on them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import nn

from trifold.compress.summary import live_totals
from trifold.core.errors import InputError
from trifold.core.version import versions
from trifold.eval.forward import evaluating
from trifold.eval.paired import jackknife_difference, paired_difference

BOOTSTRAP = 100_000  # resamplings, lm-eval's default
_SMOOTH = {"perplexity", "weighted_perplexity", "bits_per_byte"}  # aggregations that the jackknife is valid for


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data. `roots`: the lm-eval tasks and groups that were asked for. `tasks`: every task in them,
    by name. `manager`: lm-eval's TaskManager, which knows their names.
    """

    roots: tuple[Any, ...]
    tasks: Mapping[str, Any]
    manager: Any


class Difference(NamedTuple):
    """`value`: the model's metric minus the baseline's. `stderr`: its standard error with the document as the unit,
    both models on the same documents; None where there is none. `n`: documents.
    """

    value: float
    stderr: float | None
    n: int


class TaskRow(NamedTuple):
    """One metric of one task or group. `name`: `metric,filter`, as lm-eval writes it. None stands for what is not
    finite, or not there.
    """

    task: str
    name: str
    value: float | None
    stderr: float | None
    n: int | None
    baseline: float | None = None
    baseline_stderr: float | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class TaskScores:
    """One model on the tasks. `output`: what lm-eval writes into its results file, in plain JSON types, with the key
    `samples`. `truncated`: requests that were cut on the left to fit the context. `bits_per_weight` of the compressed
    layers is None for a dense model, `model_bits_per_weight` for a format that is not ours.
    """

    model: str
    output: dict[str, Any]
    truncated: int
    bits_per_weight: float | None
    model_bits_per_weight: float | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but `output`."""
        return {
            "model": self.model,
            "truncated_requests": self.truncated,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
        }


@dataclass(frozen=True)
class TaskReport:
    """A model on tasks and, with a baseline, the baseline on the same documents and what differs.

    `differences`: task -> `metric,filter` -> Difference; empty without a baseline.
    """

    model: TaskScores
    baseline: TaskScores | None = None
    differences: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """lm-eval's `results`: task -> `metric,filter` -> value."""
        found: dict[str, dict[str, Any]] = self.model.output["results"]
        return found

    def rows(self) -> list[TaskRow]:
        """Every metric of every task and group, in lm-eval's order."""
        dense = {} if self.baseline is None else self.baseline.output["results"]
        return [
            TaskRow(
                task,
                name,
                _number(value),
                _number(metrics.get(_stderr_name(name))),
                metrics.get("sample_len"),
                _number(dense.get(task, {}).get(name)),
                _number(dense.get(task, {}).get(_stderr_name(name))),
                self.differences.get(task, {}).get(name),
            )
            for task, metrics in self.results.items()
            for name, value in metrics.items()
            if _is_metric(name)
        ]

    def to_dict(self, samples: bool = False, **more: Any) -> dict[str, Any]:
        """For JSON: what lm-eval writes for the model, and under `trifold` what we know besides (docs/evaluation.md).

        samples: with lm-eval's `samples`, the answers to each document. more: entries of the `trifold` block.
        """
        block = {**self.model.to_dict(), "versions": _versions()}
        block |= {key: value for key, value in more.items() if value is not None}
        if self.baseline is not None:
            block["baseline"] = {**self.baseline.to_dict(), "lm_eval": _without(self.baseline.output, samples)}
            block["differences"] = {
                task: {name: {"difference": d.value, "stderr": d.stderr, "n": d.n} for name, d in metrics.items()}
                for task, metrics in self.differences.items()
            }
        return {**_without(self.model.output, samples), "trifold": block}


def resolve_tasks(
    tasks: Iterable[str | os.PathLike[str]],
    tasks_path: Sequence[str | os.PathLike[str]] = (),
    progress: bool = False,
) -> Tasks:
    """Tasks with their data, for `evaluate_tasks`.

    tasks: each the name of a task, group or tag (`*` matches any characters), a YAML file, or a folder, of which
    everything runs. tasks_path: folders with YAML files whose names come before lm-eval's own. Raises InputError for
    what is unknown, cannot be read, is not about text alone, or has data that cannot be had.
    """
    with _calm(progress):
        from trifold.eval.task_files import build

        return build(tasks, tasks_path)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    baseline: nn.Module | None = None,
    baseline_tokenizer: Any = None,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = "auto",
    seed: int | None = None,
    bootstrap_iters: int = BOOTSTRAP,
    progress: bool = False,
) -> TaskReport:
    """Run lm-eval's tasks on a live model and, with a `baseline`, on that too; its tokenizer is the same unless given.

    limit: documents of each task; below 1 a share. batch_size: requests, or "auto" (see `LoadedModel`). seed: of
    everything that is drawn; None is lm-eval's 0, 1234, 1234, 1234. bootstrap_iters: resamplings for the standard
    error of metrics that are not means; 0: no standard errors. progress: lm-eval's bars on stderr. Raises InputError.
    """
    if limit is not None and not limit > 0:
        raise InputError(f"limit={limit}: use a number of documents, or a share between 0 and 1")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise InputError(f"batch_size={batch_size!r}: use 1 or more, or 'auto'")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot={num_fewshot}: use 0 or more")
    if bootstrap_iters < 0:
        raise InputError(f"bootstrap_iters={bootstrap_iters}: use 0 or more")
    settings = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    settings["bootstrap_iters"] = bootstrap_iters
    if seed is not None:
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        settings.update(dict.fromkeys(seeds, seed))
    with _calm(progress):
        scores = _run(model, tokenizer, tasks, settings)
        if baseline is None:
            return TaskReport(scores)
        dense = _run(baseline, baseline_tokenizer or tokenizer, tasks, settings)
    return TaskReport(scores, dense, _differences(tasks, scores.output, dense.output))


def _run(model: nn.Module, tokenizer: Any, tasks: Tasks, settings: Mapping[str, Any]) -> TaskScores:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import handle_non_serializable, hash_string, sanitize_model_name

    from trifold.eval.task_model import LoadedModel

    tracker = EvaluationTracker()
    with evaluating(model):
        adapter = LoadedModel(model, tokenizer, settings["batch_size"])
        output = simple_evaluate(
            adapter,
            tasks=list(tasks.roots),
            task_manager=tasks.manager,
            evaluation_tracker=tracker,
            log_samples=True,
            **settings,
        )
    assert output is not None  # so it is on ranks above 0, which a model that is already loaded has not
    tracker.general_config_tracker.log_end_time()
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    hashes = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        for task, samples in output["samples"].items()
    }
    written = {  # as lm-eval's command line completes its results file
        **output,
        "task_hashes": hashes,
        **asdict(tracker.general_config_tracker),
        "model_source": "hf",
        "model_name": name,
        "model_name_sanitized": sanitize_model_name(name),
    }
    text = json.dumps(written, default=handle_non_serializable)
    sizes = live_totals(model)
    return TaskScores(
        name,
        json.loads(text, parse_constant=lambda _: None),  # NaN and infinities are no JSON
        adapter.truncated,
        sizes.get("bits_per_weight"),
        sizes.get("model_bits_per_weight"),
    )


def _differences(tasks: Tasks, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, dict[str, Difference]]:
    found: dict[str, dict[str, Difference]] = {}
    for task, metrics in ours["results"].items():
        for name, value in metrics.items():
            other = _number(theirs["results"][task].get(name))
            if not _is_metric(name) or _number(value) is None or other is None:
                continue
            stderr, n = None, metrics.get("sample_len", 0)
            if task in tasks.tasks:  # not a group
                pairs = zip(*(_items(each["samples"][task], name) for each in (ours, theirs)), strict=True)
                stderr, n = _paired_stderr(list(pairs), tasks.tasks[task].aggregation().get(name.split(",")[0]))
            found.setdefault(task, {})[name] = Difference(value - other, stderr, n)
    return found


def _items(samples: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """The values of metric `name` for each document, in order."""
    metric, _, filtered = name.partition(",")
    found = [sample for sample in samples if sample["filter"] == filtered and metric in sample]
    return [sample[metric] for sample in sorted(found, key=lambda sample: int(sample["doc_id"]))]


def _paired_stderr(pairs: Sequence[tuple[Any, Any]], aggregate: Any) -> tuple[float | None, int]:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    kind = getattr(aggregate, "__name__", "")
    if len(pairs) < 2:
        return None, len(pairs)
    if kind == "mean" and all(isinstance(x, int | float) for x in (*ours, *theirs)):
        return paired_difference(ours, theirs)[1], len(pairs)
    return (jackknife_difference(ours, theirs, aggregate)[1] if kind in _SMOOTH else None), len(pairs)


def _is_metric(name: str) -> bool:
    metric, comma, _ = name.partition(",")
    return bool(comma) and not metric.endswith("_stderr")


def _stderr_name(name: str) -> str:
    metric, _, filtered = name.partition(",")
    return f"{metric}_stderr,{filtered}"


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" for what there is not."""
    return value if isinstance(value, int | float) else None


def _without(output: Mapping[str, Any], samples: bool) -> dict[str, Any]:
    return {key: value for key, value in output.items() if samples or key != "samples"}


def _versions() -> dict[str, str]:
    return {**versions(), **{name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}}


@contextlib.contextmanager
def _calm(progress: bool) -> Iterator[None]:
    """What lm-eval prints goes to stderr, or nowhere without `progress`; only its errors are logged."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    target = sys.stderr if progress else io.StringIO()
    try:
        with contextlib.redirect_stdout(target), contextlib.redirect_stderr(target):
            yield
    finally:
        logger.setLevel(level)
