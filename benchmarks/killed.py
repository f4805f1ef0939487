"""Runs that are killed at random moments and repeated until they are done: the bytes must be those of a quiet run.

python benchmarks/killed.py --moments 10 [--recipe NAME ...] [--model demo]
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from common import ROOT, SHARED

RECIPES = {"bits": "w4a16-gptq", "weights": "s50-sparsegpt", "both": "w4-s50-gqsa"}


def start(model: Path, recipe: str, calib: Path, output: Path, sizes: list[str]) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    arguments = ["compress", model, "-r", recipe, "-o", output, "--calib", calib, "--max-shard-size", "500KB", *sizes]
    return subprocess.Popen(
        [sys.executable, "-m", "trifold", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for it, and stop if it fails."""
    _, stderr = process.communicate()
    if process.returncode:
        sys.exit(stderr.decode())


def files(folder: Path) -> dict[str, bytes]:
    """What must not depend on how the run went."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "report.json"}


def tiny_mixture(folder: Path) -> Path:
    """A random mixture of experts in the shape of the tests' one."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import save_model

    return save_model(folder / "mixture", "qwen3_moe")


def check(model: Path, recipe: str, calib: Path, work: Path, moments: int, sizes: list[str]) -> tuple[int, int]:
    """Kill at so many moments. Returns how often the run was killed at work, and how often it had finished before."""
    started = time.monotonic()
    finish(start(model, recipe, calib, work / "quiet", sizes))
    whole, wanted = time.monotonic() - started, files(work / "quiet")
    killed = done = 0
    for moment in range(moments):
        process = start(model, recipe, calib, work / "out", sizes)
        try:
            process.wait(random.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
        else:
            finish(process)
        if moment == moments - 1 and not (work / "out").exists():
            finish(start(model, recipe, calib, work / "out", sizes))
        if (work / "out").exists():
            done += 1
            found = files(work / "out")
            if found != wanted:
                changed = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
                sys.exit(f"{model.name}, {recipe}: {', '.join(sorted(changed))} differ after {killed} kills")
            (work / "out").rename(work / f"out-{moment}")
    return killed, done


@click.command()
@click.option("--moments", default=10, show_default=True, help="Of each model and recipe.")
@click.option("--seed", type=int, help="Of the moments.")
@click.option("--calib", type=click.Path(path_type=Path), default=SHARED / "data/pycode/calib.jsonl")
@click.option("--model", type=click.Path(path_type=Path), default=SHARED / "models/pycode-5m")
@click.option("--recipe", "recipes", multiple=True, help="Check the dense model with these recipes, and no mixture.")
def main(moments: int, seed: int | None, calib: Path, model: Path, recipes: tuple[str, ...]) -> None:
    """Check a dense model with a recipe of each fold, and a mixture of experts."""
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = work / "words.jsonl"
        mixture = tiny_mixture(work)
        from tests.helpers import write_text

        chosen = recipes or RECIPES.values()
        cases = [(model, recipe, calib, ["--nsamples", "8", "--seqlen", "128"]) for recipe in chosen]
        if not recipes:
            cases.append((mixture, "w4a16-awq-gptq", write_text(text), ["--nsamples", "8", "--seqlen", "32"]))
        for number, (one, recipe, read, sizes) in enumerate(cases):
            (work / str(number)).mkdir()
            killed, done = check(one, recipe, read, work / str(number), moments, sizes)
            click.echo(f"{one.name}, {recipe}: killed {killed} times, finished {done} times, the same bytes each time")


if __name__ == "__main__":
    main()
