"""Recovery in the pipeline: block by block, then the whole model; broken off, it ends the same."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import trifold
from tests.helpers import contents, make_model, make_tokenizer, trifold_cli
from trifold.compress import journal
from trifold.compress.calibration import text_windows
from trifold.compress.plan import make_plan
from trifold.compress.presets import preset_names
from trifold.compress.recipe import Recipe
from trifold.compress.tune import divide
from trifold.core.embedded import NAME
from trifold.core.errors import InputError, RecipeError
from trifold.eval import paired_difference

LLAMA = {"intermediate_size": 96}
SMALL = {"nsamples": 24, "seqlen": 32, "batch_size": 2, "verbosity": -1}
GQSA = {"method": "gqsa", "scheme": {"group_size": 8}}
BLOCKS = {"method": "bqpo", "options": {"epochs": 2, "lr_weights": 0.01, "lr_scales": 0.003, "lr_zeros": 0.01}}
WHOLE = {"method": "e2e_oqp", "options": {"epochs": 3, "lr_scales": 0.02}}


def stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_stages_are_reported_proved_and_loaded(tmp_path, tiny, text, family, dtype):
    report = trifold.compress(tiny(family, dtype), {"steps": [GQSA, BLOCKS, WHOLE]}, text, tmp_path / "out", **SMALL)
    for entry in report["layers"].values():
        assert entry["bqpo"]["after"] <= entry["bqpo"]["before"]
        assert entry["e2e_oqp"]["after"] <= entry["e2e_oqp"]["before"]
    better = any(entry["bqpo"]["after"] < entry["bqpo"]["before"] for entry in report["layers"].values())
    assert better or family == "mixtral"  # where a token that changes its expert spoils a small gain
    assert report["proof"]["kl"] <= 1e-3
    assert torch.isfinite(trifold.load(tmp_path / "out")(torch.arange(2, 12)[None]).logits).all()


STEPS = {
    "gptq": {"method": "gptq", "scheme": {"bits": 2, "group_size": 16}},
    "nf4": {"method": "rtn", "scheme": {"grid": "nf4", "group_size": 16}},
    "real zeros": {"method": "hqq", "scheme": {"group_size": 16, "zero_point": "real"}},
    "2:4": {"method": "sparsegpt", "options": {"pattern": "2:4"}, "scheme": {"group_size": 16}},
    "16 bits": {"method": "wanda"},
}


@pytest.mark.parametrize("kind", STEPS)
def test_any_quantised_model_and_pruned_ones(tmp_path, tiny, text, kind):
    def run(name, *tuners):
        steps = [STEPS[kind], *tuners]
        return trifold.compress(tiny("llama", **LLAMA), {"steps": steps}, text, tmp_path / name, **SMALL)

    coarse = {**BLOCKS, "options": {**BLOCKS["options"], "lr_weights": 0.5}}  # what 16 bits can tell apart
    tuners = [coarse] if kind == "16 bits" else [BLOCKS, WHOLE]
    plain, tuned = run("plain"), run("tuned", *tuners)
    assert plain["bits_per_weight"] == tuned["bits_per_weight"]
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "tuned")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    masks = [n for n in before if n.rpartition(".")[2] in ("weight_mask", "weight_index", "weight_row_start")]
    first = [n for n in masks if ".layers.0." in n]  # those of later blocks depend on what the first one gives
    assert all(torch.equal(before[n], after[n]) for n in first) and bool(first) is (kind in ("2:4", "16 bits"))
    entries = [layer[stage] for layer in tuned["layers"].values() for stage in ("bqpo", "e2e_oqp") if stage in layer]
    assert any(not torch.equal(before[n], after[n]) for n in before) is any("rejected" not in e for e in entries)


@pytest.mark.parametrize("tuners", [[BLOCKS], [WHOLE], [BLOCKS, WHOLE]], ids=["blocks", "whole", "both"])
def test_reported_errors_are_those_of_what_was_written(tmp_path, tiny, text, tuners):
    """Of the first layers, whose inputs no tuning changes, by hand; and the mean is theirs."""
    model = tiny("llama", **LLAMA)
    before = trifold.compress(model, {"steps": [GQSA]}, text, tmp_path / "before", **SMALL)
    report = trifold.compress(model, {"steps": [GQSA, *tuners]}, text, tmp_path / "out", **SMALL)
    name = "model.layers.0.self_attn.q_proj"
    dense, packed = trifold.load(model), trifold.load(tmp_path / "out")
    seen = []
    handle = dense.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    windows = text_windows(text, AutoTokenizer.from_pretrained(model), dense.config, 24, 32).ids
    with torch.no_grad():
        dense(torch.stack(windows))
    handle.remove()
    weight = dense.get_submodule(name).weight
    change = weight - packed.get_submodule(name).dequantize()
    by_hand = (seen[0] @ change.T).square().sum() / (seen[0] @ weight.T).square().sum()
    assert report["layers"][name]["error"] == pytest.approx(float(by_hand), rel=1e-3)
    assert report["layers"][name]["error"] != before["layers"][name]["error"]
    errors = [entry["error"] for entry in report["layers"].values()]
    assert report["mean_error"] == pytest.approx(sum(errors) / len(errors))


def test_the_second_stage_alone_changes_scales_alone(tmp_path, tiny, text):
    rough = {"method": "gqsa", "scheme": {"bits": 2, "group_size": 8}}  # so that there is something to be had
    tuner = {"method": "e2e_oqp", "options": {"epochs": 6, "lr_scales": 0.001}}
    for name, tuners in (("plain", []), ("tuned", [tuner])):
        steps = {"steps": [rough, *tuners]}
        report = trifold.compress(tiny("llama", **LLAMA), steps, text, tmp_path / name, **SMALL)
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "tuned")
    taken = all("rejected" not in entry["e2e_oqp"] for entry in report["layers"].values())
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == ({"weight_scale"} if taken else set())


def test_the_second_stage_learns_from_the_text_itself_if_asked(tmp_path, tiny, text):
    losses = {}
    for toward in ("dense", "text"):
        step = {"method": "e2e_oqp", "options": {"epochs": 1, "toward": toward}}
        plan = make_plan(Recipe.load({"steps": [GQSA, step]}), make_model("llama", **LLAMA), "model.layers")
        assert plan.tuners[0][1].follows_dense is (toward == "dense")
        report = trifold.compress(tiny("llama", **LLAMA), {"steps": [GQSA, step]}, text, tmp_path / toward, **SMALL)
        losses[toward] = next(iter(report["layers"].values()))["e2e_oqp"]["before"]
    vocabulary = make_model("llama", **LLAMA).config.vocab_size
    assert 0 < losses["dense"] < 0.1 < 0.8 * math.log(vocabulary) < losses["text"]  # a divergence, and a random model's


DISTILL = {"method": "distill"}
ROUGH = {"method": "rtn", "scheme": {"bits": 3, "group_size": 64}}


def test_distillation_learns_from_text_that_calibration_has_not_seen(tmp_path):
    """On a trained model, the embedded one: a random one predicts nothing that could get better."""
    reports, losses = {}, {}
    for name, tuners in {"plain": [], "tuned": [DISTILL]}.items():
        sizes = {"nsamples": 16, "seqlen": 64, "batch_size": 2, "dtype": "float32", "verbosity": -1}
        reports[name] = trifold.compress(NAME, {"steps": [ROUGH, *tuners]}, NAME, tmp_path / name, **sizes)
        score = trifold.evaluate(tmp_path / name, NAME, seqlen=64, max_windows=24, dtype="float32", speed=False)
        losses[name] = score.window_losses
    entry = next(iter(reports["tuned"]["layers"].values()))["distill"]
    assert entry["after"] < 0.95 * entry["before"] and len(entry["gains"]) == 2
    assert all(gain > 2 * error > 0 for gain, error in zip(entry["gains"], entry["standard_errors"], strict=True))
    plain, tuned = stored(tmp_path / "plain"), stored(tmp_path / "tuned")
    changed = {n.rpartition(".")[2] for n in plain if not torch.equal(plain[n], tuned[n])}
    assert changed - {"weight"} == {"weight_scale"}
    difference, error = paired_difference(losses["tuned"], losses["plain"])
    assert difference < -error
    calibration = reports["tuned"]["calibration"]
    assert calibration["more_tokens"] == 3 * calibration["tokens"] == 3 * 16 * 64


def test_distillation_of_a_text_that_has_no_more(tmp_path, tiny, text):
    sizes = {**SMALL, "nsamples": 10**6}
    report = trifold.compress(tiny("llama", **LLAMA), {"steps": [GQSA, DISTILL]}, text, tmp_path / "out", **sizes)
    assert report["calibration"]["more_tokens"] == 0
    assert all("distill" in layer for layer in report["layers"].values())


def command(model, text, output, folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"steps": [GQSA, BLOCKS, {"method": "e2e_oqp", "options": {"epochs": 3}}]}))
    return ("compress", model, "-r", recipe, "--nsamples", "8", "--seqlen", "32", "--batch-size", "2", "--calib", text,
            "-o", output)  # fmt: skip


def result(folder):
    return {name: data for name, data in contents(folder).items() if name != "report.json"}


@pytest.mark.parametrize("moment", ["in the first stage", "in the second stage", "before the shards"])
def test_a_run_that_is_broken_off_ends_the_same(tmp_path, tiny, text, monkeypatch, moment):
    model, kept, keep = tiny("llama", **LLAMA), [], journal.Journal.keep
    monkeypatch.setattr(
        journal.Journal, "keep", lambda self, name, tensors: kept.append(name) or keep(self, name, tensors)
    )
    assert trifold_cli(*command(model, text, tmp_path / "whole", tmp_path))[0] == 0
    monkeypatch.undo()
    owner, name, wanted = {
        "in the first stage": (journal.Journal, "write_block", 2),
        "in the second stage": (journal.Journal, "keep", kept.index("tuning-e2e_oqp") + 2),  # two epochs
        "before the shards": (journal.Journal, "keep", len(kept)),
    }[moment]
    original, calls = getattr(owner, name), []

    def broken(*args):
        original(*args)
        calls.append(None)
        if len(calls) == wanted:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, broken)
    assert trifold_cli(*command(model, text, tmp_path / "out", tmp_path))[0] == 130
    monkeypatch.undo()
    code, _, stderr = trifold_cli(*command(model, text, tmp_path / "out", tmp_path))
    assert code == 0, stderr
    if moment == "in the second stage":
        assert "epoch 3/3  loss" in stderr and "epoch 2/3  loss" not in stderr
    if moment == "before the shards":
        assert "e2e_oqp: epoch" not in stderr
    assert result(tmp_path / "out") == result(tmp_path / "whole")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path

from trifold.cli import main


def begin():
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        main(sys.argv[2:])
    return child


def state(folder):
    try:
        return sorted((f.name, f.stat().st_mtime_ns) for f in folder.glob("**/*"))
    except FileNotFoundError:  # gone in between
        return None


random.seed(0)
folder, kills, before = Path(sys.argv[1]), 0, None
for changes in (3, 9, 16, 5):
    child = begin()
    while changes and os.waitpid(child, os.WNOHANG) == (0, 0):
        if state(folder) != before:
            before, changes = state(folder), changes - 1
        time.sleep(0.0005)
    if changes:
        break  # it was done
    time.sleep(0.03 * random.random())
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(kills)
"""


def test_killed_again_and_again_without_warning(tmp_path, tiny, text):
    """The preset with the most stages; kill -9 at moments of every stage, each time the same command goes on."""
    common = ("compress", tiny("llama", **LLAMA), "-r", "w4-s50-gqsa-recovered", "--set", "epochs=2")
    common = (*common, "--nsamples", "8", "--seqlen", "32", "--batch-size", "2", "--calib", text, "-o")
    arguments = list(map(str, (*common, tmp_path / "out")))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # or the journal is another run's
    script = [sys.executable, "-c", KILLER, tmp_path / "out.partial", *arguments]
    found = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) >= 3, found.stderr
    assert trifold_cli(*arguments)[0] == 0
    assert trifold_cli(*common, tmp_path / "whole")[0] == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_live_models(tmp_path, text):
    model = make_model("llama", **LLAMA)
    with pytest.raises(InputError, match=r"'e2e_oqp' tunes a whole model.*give an output"):
        trifold.compress(model, {"steps": [GQSA, WHOLE]}, text, tokenizer=make_tokenizer(), **SMALL)
    packed = trifold.compress(model, {"steps": [GQSA, BLOCKS]}, text, tokenizer=make_tokenizer(), **SMALL)
    assert all("bqpo" in entry for entry in packed.trifold_report["layers"].values())
    model = make_model("llama", **LLAMA)
    steps = {"steps": [GQSA, BLOCKS, WHOLE]}
    written = trifold.compress(model, steps, text, tmp_path / "out", tokenizer=make_tokenizer(), **SMALL)
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(written(ids).logits, trifold.load(tmp_path / "out")(ids).logits)


ERRORS = {
    "before anything": ([BLOCKS, GQSA], "step 'bqpo': nothing inside the blocks was decided before it; put it last"),
    "between": (
        [{**GQSA, "targets": ["*mlp*"]}, BLOCKS, {"name": "b", **GQSA, "targets": ["*attn*"]}],
        "put 'b' first",
    ),
    "no scales": ([{"method": "wanda"}, WHOLE], "e2e_oqp tunes scales, and a layer without a scheme has none"),
    "rounded inputs": ([{**GQSA, "input": {"bits": 8}}, BLOCKS], "does not tune layers whose inputs are rounded"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_cannot_be_tuned_is_said_in_the_plan(tmp_path, tiny, text, kind):
    steps, message = ERRORS[kind]
    with pytest.raises(RecipeError, match=message):
        trifold.compress(tiny("llama", **LLAMA), {"steps": steps}, text, tmp_path / "out", **SMALL)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("settings", [{"epochs": -1}, {"lr_scales": -1.0}, {"lr_zeros": float("nan")}])
@pytest.mark.parametrize("tuner", ["bqpo", "e2e_oqp", "distill"])
def test_impossible_settings(tuner, settings):
    with pytest.raises(RecipeError, match="must all be 0 or more"):
        Recipe.load({"steps": [GQSA, {"method": tuner, "options": settings}]})


def test_recovered_presets():
    names = [name for name in preset_names() if name.endswith("-recovered")]
    assert len(names) == 6
    for name in names:
        methods = [[step.method for step in Recipe.load(n).steps[1:]] for n in (name, f"{name}-published")]
        assert methods == [["distill"], ["bqpo", "e2e_oqp"] if name.startswith("w4") else ["bqpo"]]
        assert not Recipe.load(name).data_free


@pytest.mark.parametrize("batches", range(1, 30))
def test_every_batch_is_learned_from_or_judged_by(batches):
    learn, judge = divide(batches)
    assert sorted({*learn, *judge}) == list(range(batches)) and learn and judge
    assert batches == 1 or (not {*learn} & {*judge} and max(learn) < min(judge))
    assert len(judge) == -(-batches // 4)
