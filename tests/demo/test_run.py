"""`trifold demo` from end to end, on a part of the text and the questions."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import contents, trifold_cli
from trifold.compress.recipe import Recipe
from trifold.demo import run
from trifold.demo.questions import read_questions


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "WINDOWS", 4)
    monkeypatch.setattr(run, "NSAMPLES", 8)
    monkeypatch.setattr(run, "read_questions", lambda task: read_questions(task)[:10])


def test_the_demo_compares_recipes_and_can_be_repeated(tmp_path):
    arguments = ("demo", "--recipes", "w8a16,w2a16-rtn", "--json", "figures.json")
    code, stdout, stderr = trifold_cli(*arguments)
    assert code == 0, stderr
    out = tmp_path / "trifold-demo"
    assert sorted(each.name for each in out.iterdir()) == ["demo.json", "demo.png", "models"]
    result = json.loads((out / "demo.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert result["chance"] == pytest.approx(0.25) and 2 < result["floor"] < 3
    dense, eight, two = result["rows"]
    assert [row["recipe"] for row in result["rows"]] == ["dense", "w8a16", "w2a16-rtn"]
    assert (dense["kl"], dense["bits_per_weight"]) == (0, 16)
    assert eight["bits_per_weight"] == 8.1875 and two["bits_per_weight"] == 2.140625
    assert dense["bytes"] > eight["bytes"] > two["bytes"] > 0
    assert two["perplexity"] > 1.2 * dense["perplexity"] and 0 < eight["kl"] < 0.01 < 0.1 < two["kl"]
    assert eight["accuracy"] == pytest.approx(sum(eight["tasks"].values()) / 4) and len(eight["tasks"]) == 4
    assert all(row["tokens_per_s"] > 0 for row in result["rows"]) and two["seconds"] > 0
    for row in result["rows"]:
        assert row["recipe"] in stdout and f"{row['perplexity']:.3f}" in stdout and row["recipe"] in stderr
    assert (out / "demo.png").read_bytes()[1:4] == b"PNG" and "trifold-demo/demo.png" in stdout
    AutoModelForCausalLM.from_pretrained(out / "models" / "w2a16-rtn")

    code, stdout, stderr = trifold_cli("demo", "--recipes", "w8a16", "-q", "--json", "-")
    assert (code, stderr) == (0, "")
    assert [row["recipe"] for row in json.loads(stdout)["rows"]] == ["dense", "w8a16"]
    assert [each.name for each in (out / "models").iterdir()] == ["w8a16"]


def test_other_peoples_files_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "models").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path / "mine")
    code, _, stderr = trifold_cli("demo", "-o", "mine")
    assert code == 2 and "mine" in stderr and "--output" in stderr
    assert contents(tmp_path / "mine") == before and (tmp_path / "mine" / "models").is_dir()
    code, _, stderr = trifold_cli("demo", "-o", "mine/thesis.txt")
    assert code == 2 and "is a file" in stderr


@pytest.mark.parametrize(
    ("recipes", "message"),
    [("w4a16-gptq,w4a16-gpt", "w4a16-gptq"), ("w8a16,w8a16", "each once"), (" , ", "one or more")],
)
def test_bad_recipes_are_refused_before_any_work(tmp_path, recipes, message):
    code, _, stderr = trifold_cli("demo", "--recipes", recipes)
    assert code == 2 and message in stderr
    assert not (tmp_path / "trifold-demo").exists()


def test_the_demo_compares_known_recipes_in_the_order_of_their_bits():
    assert [Recipe.load(name).name for name in run.RECIPES] == list(run.RECIPES)
    bits = [int(name[1]) for name in run.RECIPES]
    assert bits == sorted(bits, reverse=True)
