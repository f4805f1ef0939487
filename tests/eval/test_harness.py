"""lm-eval's tasks on live models: the numbers that lm-eval gives by hand, pairs, batches, what it reports."""

import io
import json
import math
import statistics
import sys

import lm_eval
import numpy
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

import trifold
from tests.eval.task_samples import CHOICE, ROLLING, TARGET, write_documents, write_task, write_tasks
from tests.helpers import make_model, make_tokenizer
from trifold.compress.summary import live_totals, summarise
from trifold.core.errors import InputError
from trifold.core.linears import set_weight
from trifold.eval import evaluate_tasks, resolve_tasks
from trifold.eval.harness import Difference
from trifold.kernels import PackedModule

ALL = ["choice", "generate", "rolling", "target"]
QUICK = {"bootstrap_iters": 0, "batch_size": 4}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """lm-eval starts a dozen programs to describe the machine."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("harness") / "w3"
    trifold.compress(tiny(), "w3a16-rtn", None, out, settings=["group_size=32"], verbosity=-1)
    return out


def by_hand(model, folder, monkeypatch, names, **settings):
    """lm-eval with its own `hf` model, in the folder of the tasks because their data files are relative."""
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "auto"},
            device="cpu",
            tasks=names,
            task_manager=TaskManager(include_path=".", include_defaults=False),
            **{**QUICK, **settings},
        )


@pytest.mark.parametrize(
    "settings", [{}, {"num_fewshot": 2, "limit": 5, "bootstrap_iters": 1000}], ids=["plain", "few"]
)
def test_same_numbers_as_lm_eval_by_hand(tiny, folder, monkeypatch, tmp_path, settings):
    expected = by_hand(tiny(), folder, monkeypatch, ALL, **settings)
    monkeypatch.chdir(tmp_path)
    report = trifold.evaluate_tasks(tiny(), folder / "..", **{**QUICK, **settings})
    written = report.to_dict(samples=True)
    plain = json.loads(json.dumps(expected, default=str))
    assert set(plain) < set(written) and set(report.results) == {*ALL, "both"}
    for key in ("results", "versions", "n-shot", "higher_is_better", "n-samples", "samples"):
        assert {task: written[key][task] for task in ALL} == plain[key], key
    for task in ALL:
        ours, theirs = written["configs"][task], plain["configs"][task]
        assert ours.pop("dataset_kwargs") == {"data_files": {"test": str(folder / "documents.jsonl")}}
        assert theirs.pop("dataset_kwargs") == {"data_files": {"test": "documents.jsonl"}}
        assert ours["metadata"].pop("config_source") == str(folder / theirs["metadata"].pop("config_source"))
        assert ours == theirs
    if settings:
        assert written["n-samples"]["choice"] == {"original": 24, "effective": 5}
        assert report.results["target"]["perplexity_stderr,none"] > 0
    else:
        assert 0 < report.results["choice"]["acc,none"] < 1


def test_seeds_choose_the_examples(tiny, folder, monkeypatch):
    drawn = {}
    for seed in (1, 2):
        report = trifold.evaluate_tasks(tiny(), folder / "choice.yaml", num_fewshot=1, seed=seed, limit=4, **QUICK)
        samples = drawn[seed] = report.model.output["samples"]["choice"]
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        hand = by_hand(tiny(), folder, monkeypatch, ["choice"], num_fewshot=1, limit=4, **dict.fromkeys(seeds, seed))
        assert samples == json.loads(json.dumps(hand["samples"]["choice"], default=str))
    assert [s["prompt_hash"] for s in drawn[1]] != [s["prompt_hash"] for s in drawn[2]]


def test_a_packed_model_scores_like_its_dequantised_weights(tiny, folder, checkpoint, monkeypatch, tmp_path):
    packed = trifold.load(checkpoint)
    dense = AutoModelForCausalLM.from_pretrained(tiny())
    weights = {name: module.dequantize() for name, module in packed.named_modules() if isinstance(module, PackedModule)}
    assert len(weights) == 21
    for name, weight in weights.items():
        set_weight(dense.get_submodule(name), weight)
    dense.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    hand = by_hand(tmp_path, folder, monkeypatch, ["choice", "rolling"])
    report = trifold.evaluate_tasks(packed, [folder / "choice.yaml", folder / "rolling.yaml"], **QUICK)

    def scores(samples):
        return [resp[0][0] for sample in samples["choice"] for resp in sample["resps"]]

    numpy.testing.assert_allclose(scores(report.model.output["samples"]), scores(hand["samples"]), atol=2e-4)
    for task, name in (("choice", "acc,none"), ("rolling", "word_perplexity,none")):
        assert report.results[task][name] == pytest.approx(hand["results"][task][name], rel=1e-4)
    assert report.model.bits_per_weight == summarise(checkpoint)["bits_per_weight"]
    assert report.model.model_bits_per_weight == summarise(checkpoint)["model_bits_per_weight"]


def test_differences_are_paired(tiny, folder, checkpoint):
    tasks = resolve_tasks(["both"], [folder])
    report = trifold.evaluate_tasks(checkpoint, tasks, tiny(), **QUICK)
    alone = {name: trifold.evaluate_tasks(name, tasks, **QUICK) for name in (checkpoint, tiny())}
    assert report.results == alone[checkpoint].results
    assert report.baseline.output["results"] == alone[tiny()].results
    assert report.baseline.bits_per_weight is None and report.baseline.model_bits_per_weight == 32

    def values(name, task, metric):
        return [sample[metric] for sample in alone[name].model.output["samples"][task]]

    a, b = (values(name, "choice", "acc_norm") for name in (checkpoint, tiny()))
    each = [x - y for x, y in zip(a, b, strict=True)]
    assert 0 < sum(map(abs, each)) < 24
    value, stderr, n = report.differences["choice"]["acc_norm,none"]
    assert n == 24 and value == pytest.approx(statistics.fmean(each))
    assert stderr == pytest.approx(statistics.stdev(each) / math.sqrt(24))

    a, b = (numpy.array(values(name, "target", "perplexity")) for name in (checkpoint, tiny()))
    without = [numpy.exp(-numpy.delete(a, i).mean()) - numpy.exp(-numpy.delete(b, i).mean()) for i in range(24)]
    value, stderr, n = report.differences["target"]["perplexity,none"]
    assert value == pytest.approx(numpy.exp(-a.mean()) - numpy.exp(-b.mean()))
    assert stderr == pytest.approx(numpy.sqrt(23 / 24 * ((without - numpy.mean(without)) ** 2).sum()))

    group = report.differences["both"]["acc,none"]
    means = [report.differences[task]["acc,none"].value for task in ("choice", "target")]
    assert group == Difference(pytest.approx(statistics.fmean(means)), None, 48)
    row = next(row for row in report.rows() if (row.task, row.name) == ("choice", "acc_norm,none"))
    assert (row.value, row.baseline) == (
        statistics.fmean(values(checkpoint, "choice", "acc_norm")),
        row.value - row.difference.value,
    )


def test_a_model_does_not_differ_from_itself(tiny, folder):
    model = trifold.load(tiny())
    report = trifold.evaluate_tasks(model, [folder / "choice.yaml", folder / "rolling.yaml"], model, **QUICK)
    assert [row.difference for row in report.rows()] == [(0, 0, 24)] * 3


def test_the_automatic_batch_size_holds_about_1024_tokens(tiny, folder):
    model = trifold.load(tiny())
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(args[0].shape), with_kwargs=True)
    report = trifold.evaluate_tasks(model, [folder / "choice.yaml", folder / "rolling.yaml"], bootstrap_iters=0)
    hook.remove()
    tokens = [math.prod(shape) for shape in shapes]
    assert max(tokens) <= 1024 and max(tokens) > 900
    assert len({shape[0] for shape in shapes}) > 1  # more where the requests are shorter
    assert sum(shape[0] for shape in shapes) < 24 * 3 + 24 + 1
    single = trifold.evaluate_tasks(
        model, [folder / "choice.yaml", folder / "rolling.yaml"], bootstrap_iters=0, batch_size=1
    )
    assert report.results["choice"] == single.results["choice"]
    name = "word_perplexity,none"
    assert report.results["rolling"][name] == pytest.approx(single.results["rolling"][name], rel=1e-5)


def test_nothing_but_the_result_is_left_behind(tiny, folder, capsys):
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.pad_token = None
    model.train()
    tasks = resolve_tasks([folder / "rolling.yaml", folder / "generate.yaml"])
    report = evaluate_tasks(model, tokenizer, tasks, limit=2, bootstrap_iters=0)
    assert model.training and tokenizer.pad_token is None
    assert capsys.readouterr() == ("", "")  # lm-eval prints the batch sizes that it finds
    assert "samples" not in report.to_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        evaluate_tasks(model, tokenizer, tasks, limit=2, bootstrap_iters=0, progress=True)
        assert "loglikelihood" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_an_answer_without_tokens_is_refused(tiny, tmp_path):
    write_documents(tmp_path / "documents.jsonl")
    write_task(tmp_path, {**TARGET, "doc_to_target": "{{choices[0]}}"})  # no space, so it changes the last word
    with pytest.raises(InputError, match=r"the answer 'w\d+.*' makes 0 tokens"):
        trifold.evaluate_tasks(tiny(), tmp_path, **QUICK)


def test_what_does_not_fit_the_context_is_counted_or_refused(tiny, tmp_path):
    long, short = " ".join(["w5"] * 200), "w3 w4"
    documents = [{"question": q, "choices": ["w6", "w7"], "answer": 0} for q in (long, short, long)]
    write_documents(tmp_path / "documents.jsonl")
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, documents)))
    write_task(tmp_path, TARGET, "long.jsonl")
    report = trifold.evaluate_tasks(tiny(), tmp_path, **QUICK)
    assert report.model.truncated == report.to_dict()["trifold"]["truncated_requests"] == 2
    write_task(tmp_path, {**CHOICE, "doc_to_choice": "{{[question, question]}}"}, "long.jsonl")
    with pytest.raises(InputError, match=r"the answer 'w5 w5 .*' makes 200 tokens .* of 1 to 128 that"):
        trifold.evaluate_tasks(tiny(), tmp_path / "choice.yaml", **QUICK)


def test_the_json_is_strict(tiny, tmp_path):
    model = trifold.load(tiny())
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    write_documents(tmp_path / "documents.jsonl", 3)
    write_task(tmp_path, ROLLING)
    report = trifold.evaluate_tasks(model, tmp_path, model, **QUICK)
    written = json.loads(json.dumps(report.to_dict(samples=True), allow_nan=False))
    assert written["results"]["rolling"]["word_perplexity,none"] is None
    (row,) = report.rows()
    assert (row.value, row.baseline, row.difference) == (None, None, None)


def test_the_tokenizer_of_a_live_model(tiny, folder):
    report = trifold.evaluate_tasks(trifold.load(tiny()), folder / "target.yaml", limit=2, **QUICK)
    given = trifold.evaluate_tasks(make_model(), folder / "target.yaml", limit=2, tokenizer=make_tokenizer(), **QUICK)
    assert report.results == given.results  # the fixture's model and this one come from the same seed
    with pytest.raises(InputError, match="give tokenizer="):
        trifold.evaluate_tasks(make_model(), folder / "target.yaml", **QUICK)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"limit": 0}, "limit=0"),
        ({"limit": -3}, "limit=-3"),
        ({"limit": math.nan}, "limit=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"bootstrap_iters": -1}, "bootstrap_iters=-1"),
    ],
)
def test_impossible_settings(tiny, folder, settings, fact):
    with pytest.raises(InputError, match=fact):
        trifold.evaluate_tasks(make_model(), folder / "target.yaml", tokenizer=make_tokenizer(), **settings)


def test_limits(tiny, folder):
    for limit, documents in ((3, 3), (0.3, math.ceil(0.3 * 24)), (1000, 24)):
        report = trifold.evaluate_tasks(tiny(), folder / "target.yaml", limit=limit, **QUICK)
        assert report.model.output["n-samples"]["target"] == {"original": 24, "effective": documents}


def test_no_bits_are_claimed_of_a_foreign_format(tiny):
    model = trifold.load(tiny())
    model.config.quantization_config = {"quant_method": "other"}
    assert live_totals(model) == {}
