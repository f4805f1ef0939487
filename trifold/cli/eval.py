"""`trifold eval`."""

from __future__ import annotations

import click

from trifold.cli.output import calm, emit, facts, json_option, size, with_verbosity


@click.command("eval")
@click.argument("model")
@click.option("--baseline", help="Dense model for KL divergence and top-1 agreement.")
@click.option(
    "--text",
    metavar="FILE|DATASET",
    default="Salesforce/wikitext:wikitext-2-raw-v1:test",
    show_default=True,
    help="Text to score.",
)
@click.option("--seqlen", type=int, default=2048, show_default=True, help="Tokens of a window.")
@click.option("--stride", type=int, help="Tokens between windows.  [default: seqlen]")
@click.option("--max-windows", type=click.IntRange(min=1), help="Windows to score.  [default: all]")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--no-speed", is_flag=True, help="Do not measure decoding speed.")
@json_option
@with_verbosity
def evaluate(
    model: str,
    baseline: str | None,
    text: str,
    seqlen: int,
    stride: int | None,
    max_windows: int | None,
    batch_size: int,
    dtype: str,
    trust_remote_code: bool,
    no_speed: bool,
    json_to: str | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Score MODEL: perplexity on a text, distance to a baseline, speed, memory."""
    from trifold.api import evaluate as score

    calm(quiet)
    report = score(
        model,
        text,
        baseline,
        seqlen=seqlen,
        stride=stride,
        max_windows=max_windows,
        dtype=dtype,
        batch_size=batch_size,
        speed=not no_speed,
        trust_remote_code=trust_remote_code,
    ).to_dict()
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
    emit(report, json_to, None if quiet else facts(model, rows))


def _number(value: float | None, digits: int) -> str:
    """A figure of the report, in which None stands for what is not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"
