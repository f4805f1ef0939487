"""Where the model, texts and tasks are that come with the package. They are called `demo`."""

from __future__ import annotations

from pathlib import Path

NAME = "demo"

_FOLDER = Path(__file__).resolve().parent.parent / NAME
MODEL = _FOLDER / "model"
TASKS = _FOLDER / "tasks"
TEXTS = {"--calib": _FOLDER / "text" / "calibration.jsonl", "--text": _FOLDER / "text" / "heldout.jsonl"}
"""Command-line option that asks for text -> the text of the little world that serves it."""
