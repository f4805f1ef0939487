"""The texts and questions that the package ships, written by `python -m trifold.demo.texts`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from trifold.core.embedded import TASKS, TEXTS
from trifold.demo.questions import write_questions
from trifold.demo.world import documents

FILES = {"calibration": (TEXTS["--calib"], 800), "heldout": (TEXTS["--text"], 600)}
"""Split -> its file and how many documents that holds."""


def write_texts(split: str, file: Path, count: int) -> None:
    """The first documents of a split as JSON lines with `text` and `nats`."""
    lines = [json.dumps({"text": each.text, "nats": round(each.nats, 9)}) + "\n" for each in documents(split, count)]
    file.write_text("".join(lines))


def floor(tokenizer: Any) -> float:
    """The perplexity per token of the held-out text under its own generator.

    The generator's nats cover a document's tokens and its end, which a model predicts as the next `<s>`.
    """
    records = [json.loads(line) for line in TEXTS["--text"].read_text().splitlines()]
    tokens = sum(map(len, tokenizer([each["text"] for each in records])["input_ids"]))  # one `<s>` each
    return math.exp(math.fsum(each["nats"] for each in records) / tokens)


@click.command()
def main() -> None:
    """Write the embedded texts and questions anew."""
    for split, (file, count) in FILES.items():
        file.parent.mkdir(exist_ok=True)
        write_texts(split, file, count)
    write_questions(TASKS)


if __name__ == "__main__":
    main()
