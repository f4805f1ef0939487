"""Reads the questions for lm-eval, which loads this file by its path and knows nothing of Trifold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load(questions: str, **_metadata: Any) -> dict[str, Any]:
    """The test split of the task whose questions lie in `questions`.jsonl beside this file."""
    from datasets import Dataset

    lines = Path(__file__).with_name(f"{questions}.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
