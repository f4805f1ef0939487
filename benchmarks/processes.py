"""Two processes of one thread against one: the same codes, the same quality, and less time on a larger model.

    python benchmarks/processes.py same     pycode-5m: codes of the first block, perplexity, RTN
    python benchmarks/processes.py faster   random blocks of TinyLlama's width: seconds of the whole command

Each part writes benchmarks/results/processes-PART.{json,md} with `--record`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from common import ROOT, SHARED, machine, markdown, save
from random_model import write

CALIB, HELD_OUT = SHARED / "data/pycode/calib.jsonl", SHARED / "data/pycode/eval.jsonl"


def compress(size: int, model: Path, recipe: str, output: Path, *options: str) -> tuple[float, list[float]]:
    """Run the command line in so many processes of one thread, with what `torchrun` would tell them.

    Returns the seconds it took, and those that each process computed.
    """
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "trifold", "compress", model, "-r", recipe, "-o", output, *options]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if size > 1:
        shared |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started, running = time.perf_counter(), []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        running.append(subprocess.Popen(list(map(str, command)), env={**os.environ, **shared, **own}))
    computed = []
    for process in running:
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"a process ended with {os.waitstatus_to_exitcode(status)}")
        computed.append(used.ru_utime + used.ru_stime)
    return time.perf_counter() - started, computed


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def equal_codes(one: Path, two: Path, prefix: str) -> tuple[int, int]:
    """Of the layers whose names begin so: codes that are the same, and all."""
    from trifold.compress.integration.load import read_compressed
    from trifold.core.canonical import Quantized
    from trifold.formats import layout, unpack

    first, second = read_compressed(one), read_compressed(two)
    same = total = 0
    for name in (name for name in first.modules if name.startswith(prefix)):
        codes = []
        for found in (first, second):
            spec = found.modules[name]
            canonical = unpack({leaf: found.tensors[f"{name}.{leaf}"] for leaf in layout(spec)}, spec)
            assert isinstance(canonical, Quantized)
            codes.append(canonical.codes)
        same, total = same + int((codes[0] == codes[1]).sum()), total + codes[0].numel()
    return same, total


def tensors_alike(one: Path, two: Path) -> bool:
    """Whether two checkpoints hold the same tensors, to the bit."""
    return {p.name: p.read_bytes() for p in one.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in two.glob("*.safetensors")
    }


@click.group()
def main() -> None:
    """Two processes against one."""


@main.command()
@click.option("--model", type=click.Path(path_type=Path), default=SHARED / "models/pycode-5m")
@click.option("--nsamples", default=64, show_default=True)
@click.option("--seqlen", default=256, show_default=True)
@click.option("--max-windows", default=200, show_default=True)
@click.option("--record", is_flag=True)
def same(model: Path, nsamples: int, seqlen: int, max_windows: int, record: bool) -> None:
    """Codes, perplexity and RTN; exits with 1 if they are not the same."""
    import trifold

    sizes = ("--calib", str(CALIB), "--nsamples", str(nsamples), "--seqlen", str(seqlen))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        for recipe in ("w4a16-gptq", "w4a16-awq-gptq", "w3a16-gptaq", "w4a16-rtn"):
            options = () if recipe == "w4a16-rtn" else sizes
            for size, output in ((1, one), (2, two)):
                compress(size, model, recipe, output, *options)
            found, total = equal_codes(one, two, "model.layers.0.")
            scores = [
                trifold.evaluate(str(o), HELD_OUT, seqlen=seqlen, max_windows=max_windows, speed=False).perplexity
                for o in (one, two)
            ]
            rows.append(
                {
                    "recipe": recipe,
                    "first_block": found / total,
                    "perplexity": scores,
                    "identical": tensors_alike(one, two),
                }
            )
            click.echo(rows[-1])
    head = ("recipe", "codes of the first block alike", "perplexity, one", "two", "difference", "all tensors identical")
    table = markdown(
        head,
        [
            (
                f"`{r['recipe']}`",
                f"{100 * r['first_block']:.3f} %",
                *(f"{p:.4f}" for p in r["perplexity"]),
                f"{100 * (r['perplexity'][1] / r['perplexity'][0] - 1):+.3f} %",
                "yes" if r["identical"] else "no",
            )
            for r in rows
        ],
    )
    click.echo(table)
    if record:
        about = f"{model.name}, {nsamples} x {seqlen} tokens, one and two processes of one thread.\n\n"
        save("processes-same", {"machine": machine(), "rows": rows}, about + table)
    bad = [r for r in rows if r["first_block"] < 0.999 or abs(r["perplexity"][1] / r["perplexity"][0] - 1) > 0.005]
    sys.exit(1 if bad or not rows[-1]["identical"] else 0)


@main.command()
@click.option("--layers", default=2, show_default=True)
@click.option("--nsamples", default=16, show_default=True)
@click.option("--seqlen", default=512, show_default=True)
@click.option("--recipe", default="w4a16-gptq", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/trifold-processes"), show_default=True)
@click.option("--record", is_flag=True)
def faster(layers: int, nsamples: int, seqlen: int, recipe: str, work: Path, record: bool) -> None:
    """Seconds of the whole command; exits with 1 if two processes are not 1.5 times as fast."""
    model, text = work / f"llama-{layers}", work / "calib.txt"
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        write(model, layers)
        for file in (ROOT / "trifold" / "demo" / "model").glob("tokenizer*"):
            shutil.copy(file, model)
    text.write_text((ROOT / "README.md").read_text() * 20)
    sizes = ("--calib", str(text), "--nsamples", str(nsamples), "--seqlen", str(seqlen), "--fresh")
    found = [compress(size, model, recipe, work / "out", *sizes) for size in (1, 2)]
    seconds, computed = [wall for wall, _ in found], [max(each) for _, each in found]
    table = markdown(
        ("processes", "seconds", "times as fast", "seconds of CPU of the busiest process", "times fewer"),
        [
            (size, f"{s:.1f}", f"{seconds[0] / s:.2f}", f"{c:.1f}", f"{computed[0] / c:.2f}")
            for size, (s, c) in enumerate(zip(seconds, computed, strict=True), 1)
        ],
    )
    click.echo(table)
    if record:
        about = (
            f"`{recipe}`: {layers} random blocks of TinyLlama's width, {nsamples} x {seqlen} tokens, processes of one\n"
            f"thread; the whole command, imports, writing and proof among it. Seconds of CPU tell what free cores\n"
            f"would give where others compute, too.\n\n"
        )
        save(
            "processes-faster",
            {"machine": machine(), "seconds": seconds, "computed": [each for _, each in found]},
            about + table,
        )
    sys.exit(0 if seconds[0] >= 1.5 * seconds[1] else 1)


if __name__ == "__main__":
    main()
