"""Warnings about a calibration text, each with the text that deserves it and one that does not."""

import json

import pytest
import torch

import trifold
from tests.helpers import make_tokenizer, trifold_cli, write_text
from trifold.compress.estimate import estimate_model
from trifold.compress.experts import tokens_of_experts
from trifold.compress.lint import lint
from trifold.compress.plan import LayerPlan, Plan
from trifold.compress.text import windows_from_samples
from trifold.core.method import METHODS
from trifold.core.scheme import Scheme

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def plan(width, method="gptq"):
    return Plan({"layers.0.down": LayerPlan((8, width), METHODS.get(method)(), Scheme(4, "channel"))})


def windows(*rows, seqlen=64):
    return windows_from_samples([torch.tensor(row) for row in rows], None, seqlen, None)


def distinct(count, length=32, first=0):
    generator = torch.Generator().manual_seed(0)
    return [[first, *torch.randint(2, 100, (length - 1,), generator=generator).tolist()] for _ in range(count)]


def test_nothing_is_said_of_a_good_text():
    assert lint(windows(*distinct(4)), plan(100), make_tokenizer(), "model") == ()


def test_fewer_tokens_than_inputs():
    (line,) = lint(windows(*distinct(4)), plan(200), None, "model")
    assert "128 tokens are fewer than the 200 inputs of layers.0.down" in line and "4 windows of 64" in line
    assert lint(windows(*distinct(4)), plan(200, "rtn"), None, "model") == ()


def test_repeated_windows_and_passages():
    rows = distinct(4)
    (line,) = lint(windows(*rows, *rows[:2]), plan(8), None, "model")
    assert "2 of 6 windows repeat others" in line
    one, two, three = distinct(3, 200)
    stream = torch.tensor([*one, *two, *one, *two])  # the second time across other borders of windows
    found = windows_from_samples(list(stream[:768].split(64)), None, 64, None)
    (line,) = lint(found, plan(8), None, "model")
    assert "% of its passages of 32 tokens repeat others word for word" in line
    stream = torch.tensor([*one, *two, *three])
    assert lint(windows_from_samples(list(stream[:576].split(64)), None, 64, None), plan(8), None, "model") == ()


def test_documents_that_no_window_holds():
    tokenizer = make_tokenizer()
    stream = torch.tensor([token for row in distinct(4, 100) for token in row])
    (line,) = lint(windows_from_samples(list(stream[:384].split(64)), None, 64, None), plan(8), tokenizer, "model")
    assert "4 of 4 documents are longer than a window of 64 tokens and are cut" in line
    whole = windows_from_samples(list(stream[:384].split(128)), None, 128, None)
    assert lint(whole, plan(8), tokenizer, "model") == ()


def test_a_beginning_that_the_tokenizer_adds():
    tokenizer = make_tokenizer()
    rows = distinct(4, first=5)
    assert lint(windows(*rows), plan(8), tokenizer, "model") == ()  # this one adds none itself
    tokenizer.__class__ = type("Adds", (type(tokenizer),), {"__call__": lambda self, text: {"input_ids": [0, 7]}})
    (line,) = lint(windows(*rows), plan(8), tokenizer, "model")
    assert "4 of 4 windows hold no <s>" in line
    assert lint(windows(*distinct(4)), plan(8), tokenizer, "model") == ()


def test_chats():
    tokenizer = make_tokenizer()
    (line,) = lint(windows(*distinct(4)), plan(8), tokenizer, "Llama-3-8B-Instruct")
    assert "no chat template" in line
    assert lint(windows(*distinct(4)), plan(8), tokenizer, "Digit-7B") == ()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    (line,) = lint(windows(*distinct(4)), plan(8), tokenizer, "Llama-3-8B-Instruct")
    assert "no window holds <|im_start|>" in line
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert lint(windows([0, start, 5, end], *distinct(4)), plan(8), tokenizer, "Llama-3-8B-Instruct") == ()
    word = tokenizer.decode([80])
    tokenizer.chat_template = "{% for m in messages %}" + word + " {{ m['content'] }}{% endfor %}"  # no special token
    rows = [[0, *range(8, 40)], [0, *range(50, 75)]]
    (line,) = lint(windows(*rows), plan(8), tokenizer, "model")
    assert f"no window holds {word}," in line
    assert lint(windows([0, 80, 9], *rows), plan(8), tokenizer, "model") == ()


def test_samples_that_are_cut():
    assert windows(*distinct(3, 80)).notices == ("samples: 3 of 3 samples are cut to 64 tokens",)
    assert windows(*distinct(3, 64)).notices == ()


def test_findings_are_shown_and_in_the_report(tiny, tmp_path):
    text = write_text(tmp_path / "short.jsonl", lines=2, words=30)
    arguments = ("-o", tmp_path / "out", "--calib", text, "--nsamples", 1, "--seqlen", 32)
    code, _, stderr = trifold_cli("compress", tiny(), "-r", "w4a16-gptq", *arguments)
    assert code == 0 and "whose Gram matrix is then singular" in stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("then singular" in line for line in report["calibration"]["notices"])


def test_tokens_of_experts(tiny, tmp_path, text):
    report = trifold.compress(
        tiny("qwen3_moe"), "w4a16-gptq", text, tmp_path / "out", nsamples=8, seqlen=32, verbosity=-1
    )
    tokens = report["tokens_of_experts"]
    assert set(tokens) == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert all(len(counts) == 4 and sum(counts) == 2 * 8 * 32 for counts in tokens.values())
    assert tokens_of_experts({"a.experts.1.up": {"tokens": 3}, "a.experts.0.up": {"tokens": 2}, "b.q": {}}) == {
        "a.experts": [2, 3]
    }


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-rtn"])
def test_a_plan_knows_what_takes_memory(tiny, recipe):
    found = estimate_model(tiny(), trifold.Recipe.load(recipe))
    assert max(found.memory.values()) > 10**8 and found.disk["output"] > 0 and found.device_memory == {}
