"""`trifold eval`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.table import Table

from trifold.cli.output import calm, emit, facts, json_option, size, with_verbosity
from trifold.core.errors import InputError

if TYPE_CHECKING:
    from trifold.eval import EvalReport, TaskReport

TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"


class BatchSize(click.ParamType):
    """A positive number or `auto`."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == "auto" else click.IntRange(min=1).convert(value, param, ctx)


@click.command("eval")
@click.argument("model")
@click.option("--baseline", help="Dense model for KL divergence, top-1 agreement and differences on tasks.")
@click.option("--text", metavar="FILE|DATASET", help=f"Text to score.  [default: {TEXT}; with --tasks: none]")
@click.option("--seqlen", type=int, default=2048, show_default=True, help="Tokens of a window of the text.")
@click.option("--stride", type=int, help="Tokens between windows.  [default: seqlen]")
@click.option("--max-windows", type=click.IntRange(min=1), help="Windows to score.  [default: all]")
@click.option("--no-speed", is_flag=True, help="Do not measure decoding speed.")
@click.option(
    "--tasks", metavar="NAME|FILE|DIR,...", help="Tasks of lm-eval, by name, YAML file or folder of YAML files."
)
@click.option("--tasks-path", metavar="DIR", multiple=True, help="Folder whose YAML files --tasks names.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=float, help="Documents of each task; below 1 a share.  [default: all]")
@click.option("--seed", type=int, help="Of the tasks' examples.  [default: lm-eval's]")
@click.option(
    "--bootstrap-iters",
    type=click.IntRange(min=0),
    default=100_000,
    show_default=True,
    help="Resamplings for standard errors on tasks; 0: none.",
)
@click.option("--log-samples", is_flag=True, help="With --json: the answers to each document too.")
@click.option(
    "--batch-size", type=BatchSize(), default="auto", show_default=True, help="Windows, or requests of tasks."
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@json_option
@with_verbosity
def evaluate(
    model: str,
    baseline: str | None,
    text: str | None,
    seqlen: int,
    stride: int | None,
    max_windows: int | None,
    no_speed: bool,
    tasks: str | None,
    tasks_path: tuple[str, ...],
    num_fewshot: int | None,
    limit: float | None,
    seed: int | None,
    bootstrap_iters: int,
    log_samples: bool,
    batch_size: int | str,
    dtype: str,
    trust_remote_code: bool,
    json_to: str | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Score MODEL: perplexity on a text, distance to a baseline, speed, memory; tasks of lm-eval."""
    from trifold.api import evaluate as score
    from trifold.api import evaluate_tasks, load, load_tokenizer
    from trifold.eval import resolve_tasks

    calm(quiet)
    if tasks is None:
        for option, given in {
            "--tasks-path": tasks_path,
            "--num-fewshot": num_fewshot is not None,
            "--limit": limit is not None,
            "--seed": seed is not None,
            "--log-samples": log_samples,
        }.items():
            if given:
                raise InputError(f"{option} is about tasks; name some with --tasks")
    if log_samples and not json_to:
        raise InputError("--log-samples: give --json FILE to write them to")
    progress = not quiet and sys.stderr.isatty()
    chosen = None if tasks is None else resolve_tasks(tasks.split(","), tasks_path, progress)
    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    tokenizer = load_tokenizer(model, **trust)
    subject = load(model, dtype=dtype, **trust)
    dense = None if baseline is None else load(baseline, dtype=dtype, **trust)
    scores, task_scores = None, None
    if text is not None or chosen is None:
        scores = score(
            subject,
            text or TEXT,
            dense,
            tokenizer=tokenizer,
            seqlen=seqlen,
            stride=stride,
            max_windows=max_windows,
            batch_size=batch_size,
            speed=not no_speed,
        )
    if chosen is not None:
        task_scores = evaluate_tasks(
            subject,
            chosen,
            dense,
            tokenizer=tokenizer,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            bootstrap_iters=bootstrap_iters,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    data = {} if scores is None else scores.to_dict()
    tables = [] if scores is None else [facts(model, _facts(scores))]
    if task_scores is not None:
        data = task_scores.to_dict(samples=log_samples, text=data or None)
        tables.append(_task_table(model, task_scores))
    emit(data, json_to, None if quiet else Group(*tables))


def _facts(scores: EvalReport) -> dict[str, Any]:
    report = scores.to_dict()
    rows = {
        "perplexity": _number(report["perplexity"], 4),
        "loss": f"{_number(report['loss'], 4)} nats per token",
        "tokens": f"{report['tokens']} in {report['windows']} windows of {report['seqlen']}",
        "BOS": report["bos"],
    }
    if report.get("baseline"):
        rows["baseline perplexity"] = _number(report["baseline"]["perplexity"], 4)
        rows["KL to the baseline"] = f"{_number(report['kl'], 5)} nats per token"
        rows["top-1 agreement"] = f"{100 * report['top1_agreement']:.2f} %"
    if report["decode_tokens_per_s"] is not None:
        rows["decoding"] = f"{report['decode_tokens_per_s']:.1f} tokens/s"
    rows["peak memory"] = size(report["peak_memory_bytes"])
    return rows


def _task_table(model: str, report: TaskReport) -> Table:
    columns = ["task", "metric", "documents", "model"]
    if report.baseline is not None:
        columns += ["baseline", "difference"]
    cut = report.model.truncated
    note = f"{cut} requests were cut on the left to fit the context" if cut else None
    table = Table(*columns, title=model, title_justify="left", caption=note, caption_justify="left")
    for row in report.rows():
        metric, _, chosen = row.name.partition(",")
        cells = [row.task, metric if chosen == "none" else f"{metric} ({chosen})", str(row.n)]
        cells.append(_with_error(row.value, row.stderr))
        if report.baseline is not None:
            cells.append(_with_error(row.baseline, row.baseline_stderr))
            d = row.difference
            cells.append("-" if d is None else _with_error(d.value, d.stderr, "+"))
        table.add_row(*cells)
    return table


def _with_error(value: float | None, stderr: float | None, sign: str = "") -> str:
    if value is None:
        return "not finite"
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _number(value: float | None, digits: int) -> str:
    """A figure of the report, in which None stands for what is not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"
