"""`trifold export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from trifold.cli.output import emit, facts, json_option, size


@click.command()
@click.argument("checkpoint")
@click.option(
    "--to",
    metavar="FORMAT",
    help="compressed-tensors (or one of its layouts: pack-quantized, int-quantized, float-quantized), gptq, gptq_v2, "
    "awq, gguf or dense.  [default: the best one for --engine]",
)
@click.option(
    "--engine",
    metavar="NAME",
    help="vllm, sglang, transformers, gptqmodel or llama.cpp: refuse what it does not run.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to create; with gguf also a file."
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="With --to dense: of the weights.",
)
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option(
    "--requantize", is_flag=True, help="Round what FORMAT cannot hold to the nearest scheme that it can: lossy."
)
@click.option(
    "--evaluation",
    type=click.Path(path_type=Path),
    help="What `trifold eval --json` wrote, for the model card.",
)
@click.option("--push-to-hub", metavar="REPO", help="Upload the output to a repository of the Hugging Face hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@json_option
def export(
    checkpoint: str,
    to: str | None,
    output: Path,
    engine: str | None,
    dtype: str,
    max_shard_size: str,
    requantize: bool,
    evaluation: Path | None,
    push_to_hub: str | None,
    trust_remote_code: bool,
    json_to: str | None,
) -> None:
    """Write CHECKPOINT, a folder or hub id, as another engine loads it, without changing a code.

    It may be of Trifold, compressed-tensors, GPTQ or AWQ. What the format cannot hold exactly, or the engine does not
    run, is refused before anything is written, or rounded again with --requantize.
    """
    from trifold.api import export as write

    report = write(
        checkpoint,
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
    layouts = ", ".join(f"{count} as {name}" for name, count in report["layers"].items())
    rows = {"format": report["format"], "layers": layouts, "size": size(report["total_bytes"])}
    if report["notices"]:
        rows["note"] = "; ".join(report["notices"])
    if "pushed_to" in report:
        rows["pushed to"] = report["pushed_to"]
    if requantize:
        rows["rounded again"] = f"{len(report['requantized'])} weights; all together changed by {report['error']:.2%}"
    emit(report, json_to, facts(str(output), rows))
    if requantize and report["requantized"] and json_to != "-":
        emit(report, None, _lost(report["requantized"]))


def _lost(layers: dict[str, dict[str, Any]]) -> Table:
    """What rounding again did to each weight."""
    table = Table(title="rounded again, without calibration: compare with `trifold eval`", title_justify="left")
    for column in ("weight", "was", "is", "changed by"):
        table.add_column(column)
    for name, lost in layers.items():
        table.add_row(name, lost["from"], lost["to"], f"{lost['error']:.2%}")
    return table
