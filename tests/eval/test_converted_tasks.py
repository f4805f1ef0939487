"""benchmarks/tasks.py: published files become local tasks with lm-eval's own prompts."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml

from trifold.eval import resolve_tasks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PIQA = [{"id": "x", "goal": "Boil water", "sol1": "Heat it.", "sol2": "Cool it."}] * 3
ARC = {
    "id": "y",
    "question": {"stem": "What is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]},
    "answerKey": "B",
}


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """convert(limit) -> Tasks."""
    for name, rows in {
        "lambada/lambada_test": [{"text": "She poured\n\nthe “tea”"}],
        "piqa/valid": PIQA,
        "arc/ARC-Easy-Dev": [ARC, ARC],
        "arc/ARC-Easy-Test": [ARC],
    }.items():
        path = tmp_path / "source" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "source" / "piqa" / "valid-labels.lst").write_text("0\n1\n0\n")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tasks

    def convert(limit=None):
        tasks.convert(tmp_path / "source", tmp_path / "out", limit)
        return resolve_tasks([tmp_path / "out"]).tasks

    return convert


def test_prompts_and_answers(converted):
    tasks = converted()
    questions = {}
    for name, task in tasks.items():
        (document, *_) = task.eval_docs
        questions[name] = (task.doc_to_text(document), task.doc_to_target(document))
    assert questions == {
        "lambada_openai": ("She poured\n\nthe", " “tea”"),
        "piqa": ("Question: Boil water\nAnswer:", 0),
        "arc_easy": ("Question: What is hot?\nAnswer:", 1),
    }
    assert [document["label"] for document in tasks["piqa"].eval_docs] == [0, 1, 0]
    assert tasks["piqa"].doc_to_choice(tasks["piqa"].eval_docs[0]) == ["Heat it.", "Cool it."]
    assert tasks["arc_easy"].doc_to_choice(tasks["arc_easy"].eval_docs[0]) == ["ice", "fire"]
    assert len(tasks["arc_easy"].eval_docs) == 1 and len(list(tasks["arc_easy"].fewshot_docs())) == 2


def test_the_rest_is_lm_evals_definition(converted, tmp_path):
    converted()
    definitions = Path(lm_eval.tasks.__file__).parent
    for name, source in {"lambada_openai": "lambada", "piqa": "piqa", "arc_easy": "arc"}.items():
        ours = yaml.safe_load((tmp_path / "out" / f"{name}.yaml").read_text())
        theirs = yaml.safe_load((definitions / source / f"{name}.yaml").read_text())
        differ = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
        assert differ <= {"dataset_path", "dataset_name", "dataset_kwargs", "training_split"}


def test_the_limit(converted):
    assert {name: len(task.eval_docs) for name, task in converted(2).items()} == {
        "lambada_openai": 1,
        "piqa": 2,
        "arc_easy": 1,
    }
