"""docs/evaluation.md is true: its commands parse, its task builds, its keys are those of the report."""

import json
import re
import shlex
from pathlib import Path

from trifold.cli.main import cli
from trifold.eval import resolve_tasks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_commands_parse():
    lines = [shlex.split(line, comments=True) for line in block("bash").splitlines()]
    assert len(lines) == 4
    for program, name, *arguments in lines:
        assert program == "trifold"
        cli.commands[name].make_context(name, arguments)


def test_every_option_named_exists():
    known = {option for parameter in cli.commands["eval"].params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= known


def test_the_task_builds(tmp_path):
    (tmp_path / "capitals.yaml").write_text(block("yaml"))
    document = {"question": "Capital of France?", "choices": ["Paris", "Rome"], "answer": 0}
    (tmp_path / "capitals.jsonl").write_text(json.dumps(document) + "\n")
    task = resolve_tasks([tmp_path]).tasks["capitals"]
    assert task.doc_to_text(task.eval_docs[0]) == "Question: Capital of France?\nAnswer:"
    assert task.doc_to_choice(task.eval_docs[0]) == ["Paris", "Rome"]


def test_the_files_named_exist():
    for name in re.findall(r"`(\w+/\w+\.py)`", PAGE):
        assert (ROOT / name).exists(), name
