"""What the benchmarks share: where the model pycode-5m and its texts are, and tables in Markdown."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    from trifold.core.version import versions

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, calibration and held-out text, by default those of pycode-5m."""
    parser.add_argument("--model", default=str(SHARED / "models/pycode-5m"))
    parser.add_argument("--calib", default=str(SHARED / "data/pycode/calib.jsonl"))
    parser.add_argument("--eval", default=str(SHARED / "data/pycode/eval.jsonl"))
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def save(name: str, data: Any, text: str) -> None:
    """Results as JSON and Markdown beside each other."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
