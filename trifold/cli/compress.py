"""`trifold compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trifold.cli.output import emit, facts, json_option, level, size, with_verbosity


@click.command()
@click.argument("model")
@click.option("-r", "--recipe", required=True, help="Preset name (see `trifold recipes`) or YAML file.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--calib", metavar="FILE|DATASET", help="Calibration text: .jsonl, text file, dataset name or demo.")
@click.option("--nsamples", type=int, help="Calibration windows.  [default: the recipe's, 128]")
@click.option("--seqlen", type=int, help="Tokens of a window.  [default: the recipe's, 2048]")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Windows per forward pass.  [default: about 512 tokens on a CPU, 8192 on a GPU]",
)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="What the model is loaded, computed and stored in.",
)
@click.option("--seed", type=int, help="Seed.  [default: the recipe's, 0]")
@click.option("--set", "settings", multiple=True, metavar="[STEP.]K=V", help="Change a recipe's setting.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--stats-memory",
    metavar="SIZE",
    help="Memory for the statistics of one pass, such as 2GB; more of them take more passes.  [default: a quarter "
    "of what is free]",
)
@click.option("--offload-activations", is_flag=True, help="Keep hidden states in a file, one batch in memory.")
@click.option(
    "--export-to",
    metavar="FORMAT",
    help="Also write the result as another engine loads it, to OUTPUT-FORMAT (see `trifold export`).",
)
@click.option("--engine", metavar="NAME", help="Of the export: the engine that is to run it.")
@click.option(
    "--push-to-hub", metavar="REPO", help="Upload the export, or without one the checkpoint, to the Hugging Face hub."
)
@click.option("--fresh", is_flag=True, help="Start over instead of going on with an interrupted run.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; write nothing.")
@json_option
@with_verbosity
def compress(
    model: str,
    recipe: str,
    output: Path,
    calib: str | None,
    settings: tuple[str, ...],
    export_to: str | None,
    engine: str | None,
    push_to_hub: str | None,
    dry_run: bool,
    json_to: str | None,
    verbose: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Compress MODEL, a folder, a hub id or `demo`, into a packed checkpoint.

    An interrupted run goes on when the same command is repeated. Several processes share the work:
    torchrun --nproc-per-node 2 -m trifold compress ...
    """
    from trifold.compress import checkpoint
    from trifold.compress.deliver import Delivery
    from trifold.compress.job import Options
    from trifold.compress.memory import leave_the_heap
    from trifold.compress.pipeline import run
    from trifold.compress.preflight import prepare
    from trifold.compress.progress import Reporter
    from trifold.compress.recipe import Recipe

    wanted = {name: rest.pop(name) for name in ("nsamples", "seqlen", "seed")}
    chosen = Recipe.load(recipe).updated(
        [*settings, *(f"{name}={value}" for name, value in wanted.items() if value is not None)]
    )
    reporter, options = Reporter(level(verbose, quiet)), Options(**rest)
    delivery = Delivery(export_to, engine, push_to_hub)
    if dry_run:
        checkpoint.check_output(output)
        if delivery:
            delivery.begin(output)
        job = prepare(model, chosen, calib, options, reporter)
        delivery.check(job, output)
        layers = {name: _plan_entry(plan) for name, plan in job.plan.layers.items()}
        emit({"recipe": chosen.to_dict(), "layers": layers}, json_to, _plan_table(layers))
        return
    leave_the_heap()
    _, report = run(model, chosen, calib, output, options, reporter, delivery=delivery)
    if not report:  # of another process than the one that writes
        return
    rows = {
        "recipe": chosen.name,
        "layers": len(report["layers"]),
        "bits per weight": f"{report['bits_per_weight']:.3f}",
        "whole model": f"{size(report['total_bytes'])} (dense: {size(report['dense_bytes'])})",
        "mean error": f"{report['mean_error']:.3e}",
        "seconds": f"{report['seconds']:.1f}",
        "proof": ", ".join(f"{k} {v:.1e}" for k, v in report["proof"].items()),
    }
    export = report.get("export", {})
    rows |= {"exported to": export["output"]} if export else {}
    pushed = report.get("pushed_to", export.get("pushed_to"))
    rows |= {"pushed to": pushed} if pushed else {}
    emit(report, json_to, None if quiet else facts(str(output), rows))


def _plan_entry(plan: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "shape": list(plan.shape),
        "method": type(plan.method).__name__.lower(),
        "scheme": None if plan.scheme is None else asdict(plan.scheme),
        "input": None if plan.input is None else asdict(plan.input),
    }


def _plan_table(layers: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Column, Table

    from trifold.core.inputs import InputScheme

    columns = (Column("layer", overflow="fold"), "shape", "method", "bits", "group", "input")
    table = Table(*columns, title="plan", title_justify="left")
    for name, entry in layers.items():
        inputs, scheme = entry["input"], entry["scheme"] or {"grid": "int"}
        table.add_row(
            name,
            "x".join(map(str, entry["shape"])),
            entry["method"],
            str(scheme.get("bits", "-")) if scheme["grid"] == "int" else scheme["grid"],
            str(scheme.get("group_size", "-")),
            "-" if inputs is None else InputScheme(**inputs).label,
        )
    return table
