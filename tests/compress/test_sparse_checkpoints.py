"""Sparse weights from recipe to checkpoint and back: plan, proof, from_pretrained, inspect, errors."""

import json

import pytest
import torch
from safetensors.torch import load_file

import trifold
from tests.helpers import contents, trifold_cli
from trifold.compress.estimate import estimate_model
from trifold.compress.journal import Journal
from trifold.compress.presets import preset_names
from trifold.compress.recipe import Recipe
from trifold.core.errors import RecipeError
from trifold.formats import FORMATS, bits_per_weight
from trifold.kernels import PackedLinear

PRESETS = {
    "s50-wanda": ("bitmask", "50% zeros bfloat16"),
    "s50-sparsegpt": ("bitmask", "50% zeros bfloat16"),
    "s24-sparsegpt": ("sparse24", "2:4 bfloat16"),
    "s24-alps": ("sparse24", "2:4 bfloat16"),
    "w4-s50-gqsa": ("group_sparse_int", "int4 g16 sym, "),
    "w4-s30-gqsa": ("group_sparse_int", "int4 g16 sym, "),
    "w4-s24": ("sparse24", "2:4 int4"),
    "s50-magnitude": ("bitmask", "50% zeros bfloat16"),
    "w4-s50-wanda": ("bitmask", "50% zeros int4"),
}
RECOVERED = [name for name in preset_names() if name.endswith("-recovered")]
LLAMA = {"intermediate_size": 96}  # 2:4 divides it
SMALL = {"nsamples": 8, "seqlen": 32, "verbosity": -1}


@pytest.mark.parametrize("preset", [*PRESETS, *RECOVERED])
def test_every_preset_is_proved_loaded_counted_and_shown(tmp_path, tiny, text, preset):
    name, shown = PRESETS[preset.removesuffix("-recovered")]
    recipe, planned = Recipe.load(preset), estimate_model(tiny("llama", **LLAMA), Recipe.load(preset))
    calibration = None if recipe.data_free else text
    report = trifold.compress(tiny("llama", **LLAMA), recipe, calibration, tmp_path / "out", **SMALL)
    assert planned.total_bytes == report["total_bytes"] and planned.bits_per_weight == report["bits_per_weight"]
    assert all(("distill" in layer) is (preset in RECOVERED) for layer in report["layers"].values())
    assert report["proof"]["max_abs"] <= 1e-3
    model = trifold.load(tmp_path / "out")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 21 and {module.spec["format"] for module in packed.values()} == {name}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    size = total = 0
    for layer, module in packed.items():
        tensors = {leaf: stored[f"{layer}.{leaf}"] for leaf in FORMATS.get(name).layout(module.spec)}
        canonical = FORMATS.get(name).unpack(tensors, module.spec)
        weight = canonical.dequantize()
        assert torch.equal(weight, module.dequantize()) and (weight[~canonical.mask] == 0).all()
        assert report["layers"][layer]["sparsity"] == 1 - float(canonical.mask.double().mean())
        size, total = size + 8 * sum(t.nbytes for t in tensors.values()), total + weight.numel()
        assert report["layers"][layer]["bits_per_weight"] == bits_per_weight(module.spec)
    assert report["bits_per_weight"] == size / total
    code, out, _ = trifold_cli("inspect", tmp_path / "out", "--json", "-")
    assert code == 0 and all(shown in layer["describe"] for layer in json.loads(out)["layers"].values())
    assert torch.isfinite(model(torch.arange(2, 12)[None]).logits).all()


@pytest.mark.parametrize("recipe", ["s50-wanda", "w4-s50-gqsa"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_architectures_and_16_bits(tmp_path, tiny, text, family, recipe):
    report = trifold.compress(tiny(family, torch.bfloat16), recipe, text, tmp_path / "out", **SMALL)
    model = trifold.load(tmp_path / "out")
    assert report["proof"]["kl"] <= 1e-3 and torch.isfinite(model(torch.arange(2, 12)[None]).logits).all()


@pytest.mark.parametrize("recipe", ["w4-s50-gqsa", "s24"])
def test_same_recipe_same_bytes(tmp_path, tiny, text, recipe):
    for name in ("a", "b"):
        trifold.compress(tiny("llama", **LLAMA), recipe, text, tmp_path / name, **SMALL)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {k: v for k, v in one.items() if k != "report.json"} == {k: v for k, v in two.items() if k != "report.json"}


BROKEN_OFF = ["s50-wanda", "s50-sparsegpt", "s24-sparsegpt", "w4-s50-gqsa", "w4-s30-gqsa", "w4-s24", "s50-alps"]


@pytest.mark.parametrize("preset", [*BROKEN_OFF, "s24-sparsegpt-recovered"])
def test_a_run_that_is_broken_off_ends_the_same(tmp_path, tiny, text, preset, monkeypatch):
    common = ("compress", tiny("llama", **LLAMA), "-r", preset, "--nsamples", "4", "--seqlen", "32", "--calib", text)
    assert trifold_cli(*common, "-o", tmp_path / "whole")[0] == 0
    write, blocks = Journal.write_block, []

    def broken(self, block, *args):
        if len(blocks) == 2:
            raise KeyboardInterrupt
        write(self, block, *args)
        blocks.append(block)

    monkeypatch.setattr(Journal, "write_block", broken)
    assert trifold_cli(*common, "-o", tmp_path / "out")[0] == 130
    monkeypatch.undo()
    code, _, stderr = trifold_cli(*common, "-o", tmp_path / "out")
    assert code == 0 and "going on after block 2" in stderr
    one, two = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert {k: v for k, v in one.items() if k != "report.json"} == {k: v for k, v in two.items() if k != "report.json"}


def test_dense_targets_rounded_inputs_and_embeddings(tmp_path, tiny, text):
    steps = [
        {"method": "gqsa", "scheme": {"group_size": 8}, "options": {"dense_targets": 0.25}, "input": {"bits": 8}},
        {"name": "table", "method": "magnitude", "targets": ["embeddings"], "options": {"sparsity": 0.3}},
    ]
    trifold.compress(tiny("llama", **LLAMA), {"steps": steps}, text, tmp_path / "out", **SMALL)
    model = trifold.load(tmp_path / "out")
    table = model.model.embed_tokens
    assert table.spec["format"] == "bitmask" and model.model.layers[0].mlp.up_proj.spec["input"] == {"bits": 8}
    ids = torch.tensor([[5, 9, 77]])
    assert torch.equal(table(ids), table.dequantize()[ids])


ERRORS = {
    "--set sparsity=1": ("s50-wanda", "sparsity=1.0 is outside [0, 1)"),
    "--set sparsity=-0.5": ("w4-s50-gqsa", "sparsity=-0.5 is outside [0, 1)"),
    "--set pattern=3:5": (
        "s50-wanda",
        "model.layers.0.self_attn.q_proj: in_features=48 is not a multiple of 5, so pattern='3:5' does not divide it; "
        "use pattern='unstructured' or skip the layer",
    ),
    "--set sparsity=.nan": ("s50-wanda", "sparsity=nan is outside [0, 1); 0.5 drops half of the weights"),
    "--set global_sparsity=1.5": ("w4-s50-gqsa", "global_sparsity=1.5 is outside [0, 1)"),
    "--set global_sparsity=0.6": ("s24-sparsegpt", "global_sparsity=0.6 cannot be divided with pattern='2:4'"),
    "--set zero_point=real": (
        "w4-s50-gqsa-recovered-published",
        "holds integers with integer zero-points, not zero_point='real'",
    ),
    "--set scale_dtype=int8": ("w4-s50-gqsa", "steps.0.scheme.scale_dtype: Input should be"),
    "--set pattern=2:2": ("s50-wanda", "pattern='2:2' is neither 'unstructured'"),
    "--set sparsity=0.6": ("w4-s24", "sparsity=0.6 cannot be had with pattern='2:4'"),
    "--set group_size=channel": (
        "w4-s50-gqsa",
        "model.layers.0.self_attn.q_proj: gqsa drops groups that share a scale",
    ),
    "--set grid=nf4": (
        "w4-s50-gqsa",
        "format group_sparse_int holds integers with integer zero-points, not grid='nf4'; `sparsegpt` with "
        "pattern='1x16' is held by the format bitmask",
    ),
}


@pytest.mark.parametrize("setting", ERRORS)
def test_what_cannot_be_is_one_clear_line(tmp_path, tiny, text, setting):
    recipe, message = ERRORS[setting]
    arguments = ("-r", recipe, "--calib", text, "--nsamples", "4", "--seqlen", "16", "-o", tmp_path / "out")
    code, out, err = trifold_cli("compress", tiny("llama", **LLAMA), *arguments, *setting.split())
    assert (code, out) == (2, "") and not list(tmp_path.glob("out*"))
    assert len(err.strip().splitlines()) == 1 and message in err


def test_inputs_are_rounded_only_with_weights():
    with pytest.raises(RecipeError, match="wanda rounds inputs only where it rounds weights; give it a `scheme`"):
        Recipe.load({"steps": [{"method": "wanda", "input": {"bits": 8}}]})


def test_the_plan_is_shown(tmp_path, tiny, text):
    arguments = ("-r", "s50-wanda", "--calib", text, "--nsamples", "4", "--seqlen", "16", "-o", tmp_path / "out")
    code, out, err = trifold_cli("compress", tiny("llama", **LLAMA), *arguments, "--dry-run", "--json", "-")
    assert code == 0, err
    layers = json.loads(out)["layers"]
    assert len(layers) == 21 and all(e["method"] == "wanda" and e["scheme"] is None for e in layers.values())
