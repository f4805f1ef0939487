"""The demo: compress the embedded model in several ways, and measure what each did."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trifold.api import compress, evaluate, load, load_tokenizer
from trifold.compress.progress import Reporter
from trifold.compress.recipe import Recipe
from trifold.core.embedded import MODEL, NAME
from trifold.core.errors import InputError
from trifold.demo.plot import draw
from trifold.demo.questions import KINDS, Question, read_questions
from trifold.demo.score import accuracy
from trifold.demo.texts import floor

RECIPES = (
    "w8a16",
    "w4a16-rtn",
    "w4a16-gptq",
    "w3a16-rtn",
    "w3a16-gptq",
    "w2a16-rtn",
    "w2a16-gptq",
    "w2a16-awq-gptq",
)
"""What the demo compares: any names of presets."""

NSAMPLES, SEQLEN, WINDOWS = 64, 256, 80
RESULTS, PICTURE, MODELS = "demo.json", "demo.png", "models"


@dataclass(frozen=True)
class Row:
    """What one recipe did.

    `bits_per_weight`: stored, scales included, of the compressed layers. `bytes`: of the weights on disk. `kl`: nats
    per token from the dense model; like the perplexity None if it is not finite. `accuracy`: mean over `tasks`, 0 to
    1. `seconds`: to compress and prove.
    """

    recipe: str
    method: str
    bits_per_weight: float
    bytes: int
    perplexity: float | None
    kl: float | None
    accuracy: float
    tasks: dict[str, float]
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True)
class Judge:
    """Scores models against the dense one, on the embedded text and `questions` (task -> questions)."""

    tokenizer: Any
    dense: nn.Module
    questions: dict[str, list[Question]]

    def row(self, recipe: str, method: str, model: nn.Module, folder: Path, bits: float, seconds: float) -> Row:
        """The model in a folder, scored as it is loaded: packed."""
        scores = evaluate(
            model, NAME, self.dense, tokenizer=self.tokenizer, seqlen=SEQLEN, max_windows=WINDOWS, batch_size=8
        )
        report = scores.to_dict()
        tasks = {task: accuracy(model, self.tokenizer, some) for task, some in self.questions.items()}
        return Row(
            recipe=recipe,
            method=method,
            bits_per_weight=bits,
            bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            perplexity=report["perplexity"],
            kl=report["kl"],
            accuracy=math.fsum(tasks.values()) / len(tasks),
            tasks=tasks,
            tokens_per_s=report["decode_tokens_per_s"],
            seconds=seconds,
        )

    def chance(self) -> float:
        """Accuracy of guessing."""
        tasks = [math.fsum(1 / len(each.choices) for each in some) / len(some) for some in self.questions.values()]
        return math.fsum(tasks) / len(tasks)


def demo(output: Path, recipes: Sequence[str] = RECIPES, reporter: Reporter | None = None) -> dict[str, Any]:
    """Compress with each recipe into `output`/models, score it packed, write demo.json and demo.png.

    What an earlier demo left in `output` is replaced. Returns what demo.json holds: `rows`, the dense model first,
    `chance` (accuracy of guessing) and `floor` (perplexity that no model can beat on average). Raises InputError for
    an unknown recipe, for one given twice or none, and for an `output` that holds anything else.
    """
    reporter = reporter or Reporter(-1)
    chosen = {recipe.name: recipe for recipe in map(Recipe.load, recipes)}
    if not chosen or len(chosen) != len(recipes):
        raise InputError(f"recipes {','.join(recipes)!r}: give one or more, each once")
    _make_room(output)
    reporter.notice("dense: scoring")
    judge = Judge(load_tokenizer(NAME), load(NAME), {task: read_questions(task) for task in KINDS})
    rows = [judge.row("dense", "none", judge.dense, MODEL, 16.0, 0.0)]
    for name, recipe in chosen.items():
        reporter.notice(f"{name}: compressing and scoring")
        folder = output / MODELS / name
        report = compress(NAME, recipe, NAME, folder, nsamples=NSAMPLES, seqlen=SEQLEN, verbosity=-1)
        method = " + ".join(step.method for step in recipe.steps)
        rows.append(judge.row(name, method, load(folder), folder, report["bits_per_weight"], report["seconds"]))
    result = {"floor": floor(judge.tokenizer), "chance": judge.chance(), "rows": [asdict(row) for row in rows]}
    draw(result, output / PICTURE)
    (output / RESULTS).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _make_room(output: Path) -> None:
    """An output folder without what an earlier demo wrote, marked as ours before anything else is in it."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give a folder with --output")
    if output.exists() and any(output.iterdir()) and not (output / RESULTS).exists():
        raise InputError(f"{output}: holds something else than an earlier demo; give another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text("{}\n")
    (output / PICTURE).unlink(missing_ok=True)
    shutil.rmtree(output / MODELS, ignore_errors=True)
