"""Lower rank from recipe to checkpoint and back: plan, proof, from_pretrained, inspect, resume, errors."""

import json

import pytest
import torch

import trifold
from tests.helpers import contents, make_tokenizer, trifold_cli
from trifold.compress import journal, pipeline, proof
from trifold.compress.estimate import estimate_model
from trifold.compress.recipe import Recipe
from trifold.core.canonical import Quantized
from trifold.core.errors import ProofError, RecipeError
from trifold.formats import stored_bytes
from trifold.kernels import PackedLinear

SMALL = {"nsamples": 8, "seqlen": 32, "verbosity": -1}
PRESETS = ["rank80", "rank60", "rank80-svdllm", "rank80-modegpt", "rank80-w4", "w4-lr02", "w3-lr02", "w2-lr04"]
WIDE = {"global_lr_bits": 1.5, "factor_bits": 8}  # tiny layers have no room for less


def packed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and "parts." not in n}


def settings(preset):
    return [f"{k}={v}" for k, v in WIDE.items()] if "-lr" in preset else []


def interrupted(*_):
    raise KeyboardInterrupt


def broken_off_once(monkeypatch, command):
    """Exit code and stderr of a run that stops after its first block, and then of the same command again."""
    write = journal.Journal.write_block
    monkeypatch.setattr(journal.Journal, "write_block", lambda *args: write(*args) or interrupted())
    assert trifold_cli(*command)[0] == 130
    monkeypatch.undo()
    return trifold_cli(*command)


def without_report(folder):
    return {name: data for name, data in contents(folder).items() if name != "report.json"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "opt", "gpt2"])
def test_every_preset_is_proved_loaded_and_resumed(tmp_path, tiny, text, monkeypatch, family, preset):
    options = [word for setting in settings(preset) for word in ("--set", setting)]
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
    command = ("compress", tiny(family, **layers), "-r", preset, *options, "--calib", text)
    command = (*command, "--nsamples", "4", "--seqlen", "32")
    assert trifold_cli(*command, "-o", tmp_path / "whole")[0] == 0
    code, _, stderr = broken_off_once(monkeypatch, (*command, "-o", tmp_path / "out"))
    assert code == 0 and "going on after block 1 of 2" in stderr
    assert without_report(tmp_path / "out") == without_report(tmp_path / "whole")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    model = trifold.load(tmp_path / "out")
    assert report["proof"]["max_abs"] <= 1e-3
    assert torch.isfinite(model(torch.arange(2, 12)[None]).logits).all()
    modules = packed(model)
    if preset == "rank80-modegpt":
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert not modules and report["layers"].keys() < config["slices"].keys()
        assert report["bits_per_weight"] <= 0.8 * 32
        return
    assert len(modules) == len(report["layers"])
    formats = {module.spec["format"] for module in modules.values()}
    assert formats & ({"sum"} if "-lr" in preset else {"chain", "low_rank"})
    if preset == "rank80-w4":
        kinds = [m.canonical().parts[-1] for m in modules.values() if m.spec["format"] == "chain"]
        assert kinds and all(isinstance(right, Quantized) and right.scheme.bits == 4 for right in kinds)
    assert report["bits_per_weight"] < {"rank80": 12.9, "rank60": 9.7, "rank80-svdllm": 12.9}.get(preset, 6.5)


def test_the_same_bytes_again_and_in_16_bits(tmp_path, tiny, text):
    for name in ("a", "b"):
        trifold.compress(tiny("llama", torch.bfloat16), "rank80", text, tmp_path / name, **SMALL)
    assert without_report(tmp_path / "a") == without_report(tmp_path / "b")


@pytest.mark.parametrize("wrong", [None, "a kernel", "a norm"])
def test_a_proof_allows_what_plain_products_round_between_factors(tmp_path, tiny, text, monkeypatch, wrong):
    def damaged(self, prefix, inside=True):
        found = tensors(self, prefix, inside)
        return {name: 1.05 * values if name.endswith("norm.weight") else values for name, values in found.items()}

    monkeypatch.setattr(proof, "RELATIVE_L2", 1e-4)
    multiply, tensors = PackedLinear.multiply, proof.Written.tensors
    if wrong == "a kernel":
        monkeypatch.setattr(PackedLinear, "multiply", lambda self, x, bias=None: 1.05 * multiply(self, x, bias))
    if wrong == "a norm":
        monkeypatch.setattr(proof.Written, "tensors", damaged)
    given = (tiny("llama", torch.bfloat16), "rank80", text, tmp_path / "out")
    if wrong is None:
        trifold.compress(*given, **SMALL)
    else:
        said = r"model\.layers\.0: hidden states from disk differ .*limit [1-9]\.\de-0[34]"
        with pytest.raises(ProofError, match=said):
            trifold.compress(*given, **SMALL)
    assert (tmp_path / "out").exists() is (wrong is None)


@pytest.mark.parametrize(
    "recipe", ["rank80-svdllm", "residual", {"rank": 8}, {"rank": 8, "pivot": False}, {"keep": 0.7}]
)
def test_the_plan_knows_the_exact_sizes(tmp_path, tiny, text, recipe):
    if isinstance(recipe, dict):
        recipe = {"steps": [{"method": "reduced_rank", "options": recipe}]}
    elif recipe == "residual":
        recipe = {"steps": [{"method": "residual", "options": {"lr_bits": 0.4}, "scheme": {"bits": 3}}]}
    loaded = Recipe.load(recipe).updated([])
    report = trifold.compress(tiny(), loaded, text, tmp_path / "out", **SMALL)
    planned = estimate_model(tiny(), loaded)
    for name in ("bits_per_weight", "model_bits_per_weight", "total_bytes"):
        assert getattr(planned, name) == report[name]


def test_a_budget_is_spent_and_no_more(tmp_path, tiny, text):
    found = {}
    for name, options in {
        "share": {"global_keep": 0.7, "sensitive": False},
        "bytes": {"max_bytes": 60_000},
        "even": {"keep": 0.7},
    }.items():
        steps = [{"method": "reduced_rank", "options": {**options, "multiple_of": 1, "dense_targets": 0}}]
        report = trifold.compress(tiny(), {"steps": steps}, text, tmp_path / name, **SMALL)
        specs = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["modules"]
        found[name] = sum(map(stored_bytes, specs.values())), report
    dense = sum(2 * spec["shape"][0] * spec["shape"][1] for spec in specs.values())
    step = max(2 * sum(spec["shape"]) for spec in specs.values())
    assert 0.7 * dense - step <= found["share"][0] <= 0.7 * dense
    assert 60_000 - step <= found["bytes"][0] <= 60_000
    ranks = {entry["rank"] for entry in found["share"][1]["layers"].values()}
    assert len(ranks) > 3 and len({entry["rank"] for entry in found["bytes"][1]["layers"].values()}) > 3
    assert found["share"][1]["mean_error"] < found["even"][1]["mean_error"]


def test_a_run_that_is_broken_off_keeps_its_division(tmp_path, tiny, text, monkeypatch):
    command = ("compress", tiny(), "-r", "rank80", "--calib", text, "--nsamples", "8", "--seqlen", "32")
    measured = []
    divide = pipeline.allocate_shares
    with monkeypatch.context() as inner:
        inner.setattr(journal.Journal, "write_block", interrupted)
        inner.setattr(pipeline, "allocate_shares", lambda walk: measured.append(divide(walk)) or measured[0])
        assert trifold_cli(*command, "-o", tmp_path / "out")[0] == 130
    monkeypatch.setattr(pipeline, "allocate_shares", lambda walk: 1 / 0)
    assert trifold_cli(*command, "-o", tmp_path / "out")[0] == 0 and len(measured) == 1


def test_inspect_shows_ranks(tmp_path, tiny, text):
    trifold.compress(tiny(), "rank80-svdllm", text, tmp_path / "a", **SMALL)
    recipe = Recipe.load("w3-lr02").updated(["lr_bits=1.5", "factor_bits=8"])
    trifold.compress(tiny(), recipe, text, tmp_path / "b", **SMALL)
    steps = {"steps": [{"method": "reduced_rank", "options": {"rank": 16}}]}
    trifold.compress(tiny(), steps, text, tmp_path / "c", **SMALL)
    shown = {}
    for name in "abc":
        code, out, _ = trifold_cli("inspect", tmp_path / name, "--json", "-")
        assert code == 0
        shown[name] = json.loads(out)["layers"]["model.layers.0.mlp.down_proj"]["describe"]
    assert shown["a"] == "rank 24 bfloat16"
    assert shown["b"] == "sum(int3 g128 asym | rank 4 (int8 g128 asym | int8 g128 asym))"
    assert shown["c"] == "rank 16 (split(16 rows identity | 32 rows bfloat16) | bfloat16)"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_centring_moves_biases_and_adds_those_that_are_missing(tmp_path, tiny, text, family):
    step = {"method": "svd_llm", "options": {"keep": 0.6, "centre": True}}
    report = trifold.compress(tiny(family), {"steps": [step]}, text, tmp_path / "out", **SMALL)
    assert report["proof"]["max_abs"] <= 1e-3
    model = trifold.load(tmp_path / "out")
    for name, module in packed(model).items():
        cut = "rank" in module.spec
        assert module.spec.get("bias", False) == (cut and family != "gpt2"), name
        assert (module.bias is not None) == (cut or family == "gpt2")
        assert module.bias is None or (torch.isfinite(module.bias).all() and module.bias.any())
    live = trifold.load(tiny(family))
    trifold.compress(live, {"steps": [step]}, text, inplace=True, tokenizer=make_tokenizer(), **SMALL)
    ids = torch.arange(2, 12)[None]
    assert torch.allclose(live(ids).logits, model(ids).logits, atol=1e-4)


def test_a_residual_over_sparse_weights(tmp_path, tiny, text):
    options = {"base": "sparsegpt", "base_options": {"pattern": "2:4"}, "lr_bits": 2.0, "factor_bits": 16}
    ends = {"ignore": ["*down_proj"]}  # 86 inputs are no multiple of 4
    report = trifold.compress(
        tiny(), {"steps": [{"method": "residual", "options": options, **ends}]}, text, tmp_path / "out", **SMALL
    )
    (entry, *_) = report["layers"].values()
    assert entry["sparsity"] == 0.5 and entry["residual"]["rank"] > 0
    assert {m.spec["parts"][0]["format"] for m in packed(trifold.load(tmp_path / "out")).values()} == {"sparse24"}


ERRORS = {
    "keep=1.5": ("rank80-svdllm", "keep=1.5 is outside (0, 1]"),
    "rank=0": ("rank80-svdllm", "keep=0.8 and rank=0 say different things"),
    "rounder=awq": ("rank80-w4", "rounder='awq' does not round weights"),
    "lr_bits=-1": ("w3-lr02", "lr_bits=-1.0 is outside 0..16"),
    "global_lr_bits=17": ("w3-lr02", "global_lr_bits=17.0 is outside 0..16"),
    "base=awq": ("w3-lr02", "base='awq' does not decide the weights of a layer"),
    "base_options={bits: 3}": ("w3-lr02", "base_options: unknown option of gptq 'bits'"),
    "max_bytes=10": ("rank80", "global_keep=0.8 and max_bytes=10 say different things"),
}


@pytest.mark.parametrize("setting", ERRORS)
def test_what_cannot_be_is_one_clear_line(setting):
    recipe, message = ERRORS[setting]
    with pytest.raises(RecipeError) as raised:
        Recipe.load(recipe).updated([setting])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_budget_that_is_too_small_says_so(tmp_path, tiny, text):
    recipe = Recipe.load("rank80").updated(["global_keep=null", "max_bytes=10"])
    with pytest.raises(RecipeError, match="a budget of 10 is below"):
        trifold.compress(tiny(), recipe, text, tmp_path / "out", **SMALL)
    with pytest.raises(RecipeError, match="residual over gptq, which rounds; give the step a `scheme`"):
        trifold.compress(tiny(), {"steps": [{"method": "residual"}]}, text, tmp_path / "out", **SMALL)
