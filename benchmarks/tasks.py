"""LAMBADA, PIQA and ARC-Easy as local tasks for `trifold eval --tasks`, from the files of their publishers.

    python benchmarks/tasks.py OUT [--source DIR] [--limit N]
    trifold eval MODEL --tasks OUT

Prompts, metrics and filters are taken from lm-eval's own definitions of `lambada_openai`, `piqa` and `arc_easy`, of
which only the source of the data is changed; so zero-shot figures compare with published ones. The training splits of
PIQA and ARC are not among the files: examples for few-shot prompts come from the split that is scored (PIQA) or the
development split (ARC).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from common import SHARED

Row = dict[str, Any]


def lambada(source: Path, split: str) -> Iterator[Row]:
    """Rows `{"text"}` of EleutherAI/lambada_openai."""
    yield from _jsonl(source / "lambada" / f"lambada_{split}.jsonl")


def piqa(source: Path, split: str) -> Iterator[Row]:
    """Rows `{"goal", "sol1", "sol2", "label"}` of baber/piqa."""
    name = {"validation": "valid"}[split]
    labels = (source / "piqa" / f"{name}-labels.lst").read_text().split()
    for row, label in zip(_jsonl(source / "piqa" / f"{name}.jsonl"), labels, strict=True):
        yield {key: row[key] for key in ("goal", "sol1", "sol2")} | {"label": int(label)}


def arc_easy(source: Path, split: str) -> Iterator[Row]:
    """Rows `{"id", "question", "choices": {"text", "label"}, "answerKey"}` of allenai/ai2_arc."""
    name = {"validation": "Dev", "test": "Test"}[split]
    for row in _jsonl(source / "arc" / f"ARC-Easy-{name}.jsonl"):
        choices = row["question"]["choices"]
        columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
        yield {"id": row["id"], "question": row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}


TASKS: dict[str, tuple[str, Callable[[Path, str], Iterator[Row]], list[str]]] = {
    "lambada_openai": ("lambada/lambada_openai.yaml", lambada, ["test"]),
    "piqa": ("piqa/piqa.yaml", piqa, ["validation"]),
    "arc_easy": ("arc/arc_easy.yaml", arc_easy, ["validation", "test"]),
}


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def convert(source: Path, out: Path, limit: int | None = None) -> None:
    """Write `NAME.yaml` and `NAME-SPLIT.jsonl`, of at most `limit` rows, for every task."""
    import lm_eval.tasks

    definitions = Path(lm_eval.tasks.__file__).parent
    out.mkdir(parents=True, exist_ok=True)
    for name, (definition, rows, splits) in TASKS.items():
        files = {split: f"{name}-{split}.jsonl" for split in splits}
        for split, file in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in islice(rows(source, split), limit))
            (out / file).write_text(text, encoding="utf-8")
        config = yaml.safe_load((definitions / definition).read_text())
        for split in ("training", "validation", "test"):
            if config.get(f"{split}_split") not in files:
                config.pop(f"{split}_split", None)
        config.pop("dataset_name")
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, default=SHARED / "data/tasks")
    parser.add_argument("--limit", type=int, help="rows of each split")
    args = parser.parse_args()
    convert(args.source, args.out, args.limit)


if __name__ == "__main__":
    main()
