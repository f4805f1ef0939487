"""`trifold demo`, kept: benchmarks/results/demo.*, docs/demo.png, and the table that opens README.md.

python benchmarks/demo.py
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, machine, markdown, save

from trifold.cli.output import size
from trifold.compress.progress import Reporter
from trifold.demo.run import PICTURE, demo

HEAD = ("recipe", "bits per weight", "on disk", "perplexity", "KL to dense", "tasks right", "tokens/s", "compressed in")
MARKED = re.compile(r"(<!-- results:demo -->\n).*?(<!-- /results:demo -->)", re.DOTALL)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    dense = row["recipe"] == "dense"
    return (
        row["recipe"] if dense else f"`{row['recipe']}`",
        f"{row['bits_per_weight']:.2f}",
        size(row["bytes"]),
        f"{row['perplexity']:.3f}",
        "" if dense else f"{row['kl']:.4f}",
        f"{100 * row['accuracy']:.1f} %",
        f"{row['tokens_per_s']:.0f}",
        "" if dense else f"{row['seconds']:.1f} s",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        result = demo(output, reporter=Reporter(0))
        shutil.copyfile(output / PICTURE, ROOT / "docs" / PICTURE)
    table = markdown(HEAD, [cells(row) for row in result["rows"]])
    where = machine()
    note = (
        f"\nNo model can have a perplexity below {result['floor']:.3f} on this text; guessing gets "
        f"{100 * result['chance']:.0f} % of the tasks right. {where['cpu']}, {where['threads']} threads, "
        f"torch {where['torch']}.\n"
    )
    save("demo", {"machine": where, **result}, f"# The demo\n\n{table}{note}")
    readme = ROOT / "README.md"
    text, count = MARKED.subn(lambda match: f"{match[1]}{table}{note}{match[2]}", readme.read_text())
    assert count == 1, "README.md has lost its marks"
    readme.write_text(text)


if __name__ == "__main__":
    main()
