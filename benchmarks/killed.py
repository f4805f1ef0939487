"""Runs that are killed at random moments and repeated until they are done: the bytes must be those of a quiet run.

Each run is a process of its own, forked from one that has imported everything, so that kills fall into the work.

python benchmarks/killed.py --moments 10 [--recipe NAME ...] [--only PART]
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import click
import torch
from common import RESULTS, ROOT, SHARED, machine, markdown, save

sys.path.insert(0, str(ROOT))
from trifold.cli.main import main as trifold

RECIPES = {
    "bits": ["w4a16-gptq"],
    "bits, with a dense stream": ["w3a16-awq-gptaq"],
    "weights": ["s50-sparsegpt"],
    "weights and bits": ["w4-s50-gqsa"],
    "weights, a budget for all layers": ["s50-wanda", "--set", "global_sparsity=0.5"],
    "weights and bits, tuned": ["w4-s50-gqsa-recovered"],
    "rank, a budget for all layers": ["rank80"],
    "bits and rank": ["w4-lr02"],
    "dimensions": ["rank80-modegpt"],
}
MIXTURES = {"qwen3_moe": ["w4a16-awq-gptq"], "mixtral": ["w4-s50-gqsa"]}


@dataclass
class Outcome:
    """places: where the run was when it was killed, and how often. finished: checkpoints that were compared."""

    model: str
    recipe: str
    kind: str
    seconds: float
    finished: int = 0
    places: Counter[str] = field(default_factory=Counter)


def start(model: Path, recipe: list[str], calib: Path, output: Path, sizes: list[str]) -> int:
    """The command line in a process of its own: its id."""
    process = os.fork()
    if process:
        return process
    messages = output.with_name("messages").open("w")
    os.dup2(messages.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    arguments = ["compress", model, "-r", *recipe, "-o", output, "--calib", calib, "--max-shard-size", "500KB", *sizes]
    try:
        trifold([str(argument) for argument in arguments])
    except SystemExit as stopped:
        os._exit(int(stopped.code or 0))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    os._exit(1)


def ended(process: int, output: Path, seconds: float | None = None) -> bool:
    """Whether it ends within this time. Stops if it fails."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG if deadline is not None else 0)
        if found:
            if status:
                code, told = os.waitstatus_to_exitcode(status), output.with_name("messages").read_text()
                sys.exit(f"a run ended with {code}:\n{told}")
            return True
        time.sleep(0.002)
    return False


def files(folder: Path) -> dict[str, bytes]:
    """What must not depend on how the run went."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "report.json"}


def place(output: Path) -> str:
    """How far a run had come, as its files tell."""
    partial = output.with_name(output.name + ".partial")
    if output.exists():
        return "when it was done"
    if not (partial / "journal" / "fingerprint.json").exists():
        return "after the proof" if (partial / "report.json").exists() else "before the journal"
    if (partial / "config.json").exists():
        return "in the proof"
    if any(partial.glob("*.safetensors*")):
        return "between shards"
    if any((partial / "journal").glob("tuning-*")):
        return "tuning the model"
    return f"behind block {len(list((partial / 'journal').glob('block-*.json')))}"


def check(
    model: Path, kind: str, recipe: list[str], calib: Path, work: Path, moments: int, sizes: list[str]
) -> Outcome:
    """Kill at so many moments of runs that go on where the one before was, and of new ones when one is done."""
    output, started = work / "out", time.monotonic()
    ended(start(model, recipe, calib, work / "quiet", sizes), work / "quiet")
    outcome = Outcome(model.name, " ".join(recipe), kind, time.monotonic() - started)
    wanted = files(work / "quiet")
    while sum(outcome.places.values()) < moments or not outcome.finished:
        last = sum(outcome.places.values()) >= moments
        process = start(model, recipe, calib, output, sizes)
        if not ended(process, output, None if last else random.uniform(0.05, 0.9) * outcome.seconds):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            outcome.places[place(output)] += 1
        if output.exists():  # as a whole, or not at all
            outcome.finished += 1
            found = files(output)
            if found != wanted:
                changed = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
                sys.exit(f"{model.name}, {outcome.recipe}: {', '.join(sorted(changed))} differ")
            output.rename(work / f"out-{outcome.finished}")
    return outcome


def cases(
    work: Path, model: Path, calib: Path, presets: tuple[str, ...]
) -> list[tuple[Path, str, list[str], Path, list[str]]]:
    """Model, kind of recipe, recipe, text and sizes of every check; of the presets alone, should there be any."""
    from tests.helpers import save_model, write_text

    recipes = [("chosen", [preset]) for preset in presets] or list(RECIPES.items())
    found = [(model, kind, recipe, calib, ["--nsamples", "8", "--seqlen", "128"]) for kind, recipe in recipes]
    if presets:
        return found
    text = write_text(work / "words.jsonl")
    for family, recipe in MIXTURES.items():
        mixture = save_model(work / family, family)
        found.append((mixture, "a mixture of experts", recipe, text, ["--nsamples", "8", "--seqlen", "32"]))
    return found


@click.command()
@click.option("--moments", default=10, show_default=True, help="Of each model and recipe.")
@click.option("--seed", type=int, help="Of the moments.")
@click.option("--calib", type=click.Path(path_type=Path), default=SHARED / "data/pycode/calib.jsonl")
@click.option("--model", type=click.Path(path_type=Path), default=SHARED / "models/pycode-5m")
@click.option("--recipe", "recipes", multiple=True, help="Check the dense model with these presets, and no mixture.")
@click.option("--only", help="Only recipes or mixtures whose name holds this.")
@click.option("--record", is_flag=True, help="Write benchmarks/results/killed.{json,md}.")
def main(
    moments: int, seed: int | None, calib: Path, model: Path, recipes: tuple[str, ...], only: str | None, record: bool
) -> None:
    """Check a dense model with recipes of each fold, and mixtures of experts."""
    random.seed(seed)
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for one, kind, recipe, text, sizes in cases(work, model, calib, recipes):
            if only and only not in f"{one.name} {' '.join(recipe)}":
                continue
            (work / str(len(outcomes))).mkdir()
            outcomes.append(check(one, kind, recipe, text, work / str(len(outcomes)), moments, sizes))
            found = outcomes[-1]
            click.echo(
                f"{found.model}, {found.recipe}: killed {sum(found.places.values())} times, finished {found.finished} "
                f"times, the same bytes each time ({_places(found)})"
            )
            if record:
                write([found])


def _places(outcome: Outcome) -> str:
    return ", ".join(f"{place} {count}" for place, count in sorted(outcome.places.items()))


def write(outcomes: list[Outcome]) -> None:
    """Put these into benchmarks/results/killed.{json,md}, in the place of those of the same models and recipes."""
    file = RESULTS / "killed.json"
    before = [Outcome(**run) for run in json.loads(file.read_text())["runs"]] if file.exists() else []
    kept = {(o.model, o.recipe): o for o in (*before, *outcomes)}
    outcomes = [kept[key] for key in sorted(kept)]
    head = ("model", "recipe", "of", "seconds", "killed", "finished, all alike", "where it was killed")
    rows: list[tuple[Any, ...]] = [
        (o.model, f"`{o.recipe}`", o.kind, f"{o.seconds:.1f}", sum(o.places.values()), o.finished, _places(o))
        for o in outcomes
    ]
    about = (
        "kill -9 at random moments of each run, which then goes on with the same command; whenever it is\n"
        "done, all files but report.json are compared with those of a run that nothing disturbed.\n\n"
    )
    save("killed", {"machine": machine(), "runs": [vars(o) for o in outcomes]}, about + markdown(head, rows))


if __name__ == "__main__":
    main()
