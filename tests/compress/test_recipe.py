"""Recipes: YAML and back, presets, `--set`, patterns, and the plan they make."""

import dataclasses
import re

import pytest
import yaml
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from tests.helpers import make_model
from trifold.compress.plan import make_plan
from trifold.compress.presets import STEPS, preset_names
from trifold.compress.recipe import Recipe, matches
from trifold.core.errors import RecipeError
from trifold.core.inputs import InputScheme
from trifold.core.method import METHODS
from trifold.core.scheme import Scheme
from trifold.lowrank import ASVD, SVDLLM, MoDeGPT, ReducedRank, Residual
from trifold.quantizers.gptq import GPTQ
from trifold.quantizers.rtn import RTN
from trifold.sparsity import ALPS, GQSA, SparseGPT, Wanda

FULL = """
name: mixed
steps:
- method: awq
  options: {scaling: plain, grid: 10}
  ignore: ['*down_proj']
- method: gptq
  name: main
  scheme: {bits: 3, group_size: 64, symmetric: true, scale_dtype: float16}
  ignore: ['re:.*\\.[02]\\.mlp\\.down_proj']
  options: {damping: 0.05}
  overrides:
  - {match: '*q_proj', scheme: {bits: 8, group_size: channel}}
  - {match: '*.1.self_attn.q_proj', options: {act_order: false}}
  - {match: 're:.*v_proj$', skip: true}
- method: rtn
  targets: ['re:.*\\.[02]\\.mlp\\.down_proj']
  scheme: {bits: 4, group_size: 16}
  input: {bits: 8}
nsamples: 12
seqlen: 64
true_sequential: false
seed: 3
"""
LAYERS = "model.layers"


@pytest.fixture
def full(tmp_path):
    (tmp_path / "mixed.yaml").write_text(FULL)
    return Recipe.load(tmp_path / "mixed.yaml")


# -- loading -------------------------------------------------------------------------------------------------


def test_yaml_round_trip(full, tmp_path):
    (tmp_path / "again.yml").write_text(full.to_yaml())
    assert Recipe.load(tmp_path / "again.yml") == full
    assert Recipe.load(str(tmp_path / "again.yml")) == full
    assert Recipe.load(full.to_dict()) == full
    assert Recipe.load(full) is full
    assert yaml.safe_load(full.to_yaml()) == full.to_dict()


def test_everything_in_the_file_is_in_the_recipe(full):
    awq, main, rest = full.steps
    assert [step.name for step in full.steps] == ["awq", "main", "rtn"]
    assert (full.name, full.nsamples, full.seqlen, full.true_sequential, full.seed) == ("mixed", 12, 64, False, 3)
    assert awq.scheme is None and awq.options["grid"] == 10 and awq.targets == ("blocks",)
    assert main.scheme.build() == Scheme(3, 64, True, "float16")
    assert main.build() == GPTQ(damping=0.05)
    assert rest.build() == RTN() and rest.input.build() == InputScheme(8)


def test_defaults_are_written_out():
    """So that a recipe in a checkpoint means the same to a later version with other defaults."""
    recipe = Recipe.load({"steps": [{"method": "gptq"}]})
    step = recipe.to_dict()["steps"][0]
    assert step["name"] == "gptq" and step["scheme"]["bits"] == 4
    assert step["options"] == dataclasses.asdict(GPTQ())
    assert Recipe.load({"steps": [{"method": "rtn", "scheme": None, "options": None}]}).steps[0].scheme is not None


def test_file_name_is_the_name_unless_it_has_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: [{method: rtn}]")
    assert Recipe.load(tmp_path / "mine.yaml").name == "mine"


def test_two_of_four_is_no_number_to_the_base_60(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "steps: [{method: wanda, options: {pattern: 2:4}}]\nnsamples: 0x10\nseed: 1_000"
    )
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert recipe.steps[0].options["pattern"] == "2:4" and (recipe.nsamples, recipe.seed) == (16, 1000)
    assert recipe.updated(["pattern=4:8", "seed=-0"]).steps[0].options["pattern"] == "4:8"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "again.yaml") == recipe


def test_a_recipe_cannot_be_changed(full):
    with pytest.raises(ValueError, match="frozen"):
        full.seed = 4


# -- presets -------------------------------------------------------------------------------------------------


GROUPS = {"a8": "channel", "channel": "channel", "fp8": "channel", "nf4": 64, "fp4": 32, "hqq": 64}


SPARSE = [name for name in preset_names() if re.search(r"\bs\d\d\b", name)]
CUT = [name for name in preset_names() if "modegpt" in name]


LOW_RANK = [name for name in preset_names() if re.search(r"rank\d\d|-lr\d\d", name)]


@pytest.mark.parametrize("name", sorted({*preset_names()} - {*SPARSE, *LOW_RANK, *CUT}))
def test_listed_presets_are_recipes(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    bits = int(name[1])
    ends = int(name.rpartition("-e")[2]) if "-e" in name else 16
    steps = recipe.steps if ends == 16 else recipe.steps[:-1]
    if ends != 16:
        assert recipe.steps[-1].scheme.bits == ends and recipe.steps[-1].targets == ("embeddings", "head")
    last = steps[-1]
    assert last.scheme.bits == bits
    assert (last.input is not None) is ("a8" in name)
    group = next((group for part, group in GROUPS.items() if part in name), 128)
    assert last.scheme.group_size == group
    needs = any(METHODS.get(step.method).needs for step in recipe.steps) or "static" in name
    assert recipe.data_free is not needs


def test_presets_with_smaller_dimensions():
    assert set(CUT) == {"rank80-modegpt", "rank60-modegpt", "rank80-modegpt-published"}
    (ours,), (published,) = Recipe.load("rank60-modegpt").steps, Recipe.load("rank80-modegpt-published").steps
    assert ours.build() == MoDeGPT(keep=0.6) and not ours.solves and ours.wants_text
    assert published.build() == MoDeGPT(0.8, "influence", "leverage", "diagonal", "alone", False, damping=1e-6)


def test_presets_with_fewer_weights():
    def first(name):
        step = Recipe.load(name).steps[0]
        return step.build(), None if step.scheme is None else step.scheme.build()

    assert first("s50-wanda") == (Wanda(0.5), None)
    assert first("s50-sparsegpt") == (SparseGPT(0.5), None)
    assert first("s50-alps") == first("s50") == (ALPS(0.5), None)
    assert first("s24-sparsegpt") == (SparseGPT(pattern="2:4"), None)
    assert first("s24-alps") == first("s24") == (ALPS(pattern="2:4"), None)
    assert first("w4-s24") == first("w4a16-s24-alps") == (ALPS(pattern="2:4"), Scheme(4, 128))
    assert first("w4-s24-sparsegpt") == (SparseGPT(pattern="2:4"), Scheme(4, 128))
    assert first("w4-s50-gqsa") == first("w4-s50") == (GQSA(0.5), Scheme(4, 16, symmetric=True))
    assert first("w4-s50-gqsa-recovered-published") == (GQSA(0.5), Scheme(4, 16))
    assert first("w3-s30-wanda") == (Wanda(0.3), Scheme(3, 128))
    assert Recipe.load("s70-magnitude").data_free and not Recipe.load("s70").data_free
    for name, why in (("s50-gqsa", "rounds what stays; write w4-s50-gqsa"), ("w4-s24-gqsa", "drops groups")):
        with pytest.raises(RecipeError, match=f"{name}: gqsa {why}"):
            Recipe.load(name)
    assert set(SPARSE) >= {"s50-wanda", "s50-sparsegpt", "s24-sparsegpt", "w4-s50-gqsa", "w4-s30-gqsa", "w4-s24"}


def test_presets_of_lower_rank():
    def first(name):
        (step,) = Recipe.load(name).steps
        return step.build(), None if step.scheme is None else step.scheme.build()

    assert first("rank80") == (ReducedRank(global_keep=0.8), None)
    assert first("rank60") == (ReducedRank(global_keep=0.6), None)
    assert first("rank80-svdllm") == (SVDLLM(keep=0.8), None)
    assert first("rank70-asvd") == (ASVD(keep=0.7), None) and Recipe.load("rank70-svd").data_free
    assert first("rank80-w4") == (ReducedRank(global_keep=0.8), Scheme(4, 128))
    assert first("rank60-svdllm-w8") == (SVDLLM(keep=0.6), Scheme(8, 128))
    for bits, tenths in ((4, 2), (3, 2), (2, 4), (3, 15)):
        factors = 3 if bits == 2 else 4
        assert first(f"w{bits}-lr{tenths:02d}") == (
            Residual(global_lr_bits=tenths / 10, factor_bits=factors),
            Scheme(bits, 128),
        )
    assert set(LOW_RANK) >= {"rank80", "rank60", "rank80-svdllm", "rank80-w4", "w4-lr02", "w3-lr02", "w2-lr04"}
    for name in ("rank80-gptq", "w4a16-rank80", "rank8"):
        with pytest.raises(RecipeError, match=f"unknown recipe '{name}'"):
            Recipe.load(name)


def test_presets_of_rounded_activations():
    def last(name):
        step = Recipe.load(name).steps[-1]
        return step.method, step.scheme.build(), step.input.build()

    channel = Scheme(8, "channel", True)
    assert last("w8a8") == last("w8a8-rtn") == ("rtn", channel, InputScheme(8))
    assert last("w8a8-static") == ("rtn", channel, InputScheme(8, static=True))
    assert last("w8a8-gptq-static") == ("gptq", channel, InputScheme(8, static=True))
    assert last("w4a8-llmint8") == ("llm_int8", Scheme(4, "channel", True), InputScheme(8))
    fp8 = Scheme(8, "channel", True, grid="fp8_e4m3")
    assert last("w8a8-fp8") == ("rtn", fp8, InputScheme(grid="fp8_e4m3"))
    assert last("w8a8-fp8-static")[2] == InputScheme(grid="fp8_e4m3", static=True)
    assert [step.method for step in Recipe.load("w8a8-smoothquant-gptq").steps] == ["smoothquant", "gptq"]
    for name, word in (("w4a16-smoothquant", "smoothquant"), ("w4a16-static", "static"), ("w8-llmint8", "llmint8")):
        with pytest.raises(RecipeError, match=f"{word} is about activations, which a16 leaves"):
            Recipe.load(name)


@pytest.mark.parametrize(("name", "bits"), [("w5", 5), ("w6a16", 6), ("w1a16-rtn", 1), ("w7a8-awq-gptq", 7)])
def test_unlisted_widths_are_presets_too(name, bits):
    assert Recipe.load(name).steps[-1].scheme.bits == bits


@pytest.mark.parametrize(
    ("name", "method", "scheme"),
    [
        ("w8a16-channel", "rtn", Scheme(8, "channel", True)),
        ("w4a16-channel-gptq", "gptq", Scheme(4, "channel", True)),
        ("w8a16-fp8", "rtn", Scheme(8, "channel", grid="fp8_e4m3")),
        ("w4a16-nf4", "rtn", Scheme(4, 64, grid="nf4")),
        ("w4a16-nf4-awq-gptq", "gptq", Scheme(4, 64, grid="nf4")),
        ("w4a16-fp4-gptq", "gptq", Scheme(4, 32, grid="fp4_e2m1")),
        ("w3-hqq", "hqq", Scheme(3, 64, zero_point="real")),
        ("w4a16-channel-hqq", "hqq", Scheme(4, "channel", True)),
        ("w8a8-hqq", "hqq", Scheme(8, "channel", True)),
    ],
)
def test_grids_in_preset_names(name, method, scheme):
    last = Recipe.load(name).steps[-1]
    assert last.method == method and last.scheme.build() == scheme
    if method != "hqq":
        assert last.options["ranges"] == ("minmax" if name == "w4a16-nf4" else "mse")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w3a16-nf4", "grid='nf4' has 4 bits, not bits=3"),
        ("w4a16-fp8", "grid='fp8_e4m3' has 8 bits, not bits=4"),
        ("w4a8-nf4", "no preset with nf4; write w4a16-nf4"),
        ("w4a16-nf5", "did you mean w4a16-nf4"),
        ("w4a16-nf4-gptp", "did you mean w4a16-nf4-gptq"),
    ],
)
def test_grids_that_do_not_fit(name, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(name)


def test_presets_do_not_share_state():
    first, second = Recipe.load("w4a16-awq-gptq"), Recipe.load("w3a16-awq-gptq")
    assert first.steps[-1].scheme.bits == 4 and second.steps[-1].scheme.bits == 3
    assert all("bits" not in step.get("scheme", {}) for steps in STEPS.values() for step in steps)


@pytest.mark.parametrize(
    ("name", "free"),
    [("w4a16-rtn", True), ("w8a8", True), ("w8a16", True), ("w4a16-gptq", False), ("w4a16-awq", False)],
)
def test_data_free(name, free):
    assert Recipe.load(name).data_free is free


# -- --set ---------------------------------------------------------------------------------------------------


def test_set_changes_every_owner(full):
    changed = full.updated(["bits=2", "ranges=minmax"])
    assert [step.scheme and step.scheme.bits for step in changed.steps] == [None, 2, 2]
    assert [step.options.get("ranges") for step in changed.steps] == [None, "minmax", "minmax"]
    assert full.steps[1].scheme.bits == 3  # the old one is as it was


def test_set_changes_one_step(full):
    changed = full.updated(["rtn.bits=2", "main.damping=1e-3", "awq.clip=false"])
    assert [step.scheme and step.scheme.bits for step in changed.steps] == [None, 3, 2]
    assert changed.steps[1].options["damping"] == 0.001
    assert changed.steps[0].options["clip"] is False


def test_set_reaches_the_inputs(full):
    changed = full.updated(["input.bits=6", "rtn.input.static=true"])
    assert changed.steps[2].input.build() == InputScheme(6, static=True)
    assert [step.scheme and step.scheme.bits for step in changed.steps] == [None, 3, 4]
    assert Recipe.load("w8a8").updated(["input.grid=fp8_e4m3"]).steps[0].input.build() == InputScheme(grid="fp8_e4m3")
    with pytest.raises(RecipeError, match=r"input bits=4: fp8_e4m3 has 8"):
        Recipe.load("w8a8-fp8").updated(["input.bits=4"])
    for setting in ("main.input.bits=8", "input.bitz=8", "static=true"):
        with pytest.raises(RecipeError, match="unknown setting"):
            full.updated([setting])


def test_set_changes_the_recipe(full):
    changed = full.updated(["seed=9", "recipe.nsamples=4", "seqlen=8", "true_sequential=true"])
    assert (changed.seed, changed.nsamples, changed.seqlen, changed.true_sequential) == (9, 4, 8, True)


def test_later_settings_win(full):
    assert full.updated(["bits=2", "main.bits=5"]).steps[1].scheme.bits == 5


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("main.ignore=*q_proj", ("*q_proj",)),
        ("main.ignore=['*q_proj', '*k_proj']", ("*q_proj", "*k_proj")),
        ("main.ignore=[]", ()),
        ("main.ignore=re:.*\\.0\\..*", ("re:.*\\.0\\..*",)),
    ],
)
def test_set_patterns(full, setting, expected):
    assert full.updated([setting]).steps[1].ignore == expected


def test_set_group_size_by_name_and_number(full):
    assert full.updated(["main.group_size=tensor"]).steps[1].scheme.group_size == "tensor"
    assert full.updated(["main.group_size=16"]).steps[1].scheme.group_size == 16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bitz=3", "unknown setting 'bitz'; did you mean bits"),
        ("mian.bits=3", "did you mean main.bits"),
        ("awq.bits=3", "unknown setting 'awq.bits'"),
        ("recipe.bits=3", "unknown setting 'recipe.bits'"),
        (".bits=3", "unknown setting"),
        ("method=rtn", "unknown setting 'method'"),
        ("bits", "write it as key=value"),
        ("bits=9", "mixed: steps.1.scheme: bits=9 is outside 1..8"),
        ("seed=[1]", "mixed: seed: Input should be a valid integer"),
    ],
)
def test_set_of_something_impossible(full, setting, message):
    with pytest.raises(RecipeError) as caught:
        full.updated([setting])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# -- patterns and the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "layer", "fits"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("*up_proj", "model.layers.1.mlp.up_proj", True),
        ("up_proj", "model.layers.1.mlp.up_proj", False),
        ("model.layers.[12].*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.[02].*", "model.layers.1.mlp.up_proj", False),
        ("*UP_PROJ", "model.layers.1.mlp.up_proj", False),
        ("re:.*up_proj", "model.layers.1.mlp.up_proj", True),
        ("re:up_proj", "model.layers.1.mlp.up_proj", False),
        (r"re:model\.layers\.\d+\.mlp", "model.layers.1.mlp.up_proj", True),
        (r"re:model\.layers\.\d+\.mlp$", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_patterns(pattern, layer, fits):
    assert matches(pattern, layer) is fits


@pytest.fixture(scope="module")
def model():
    return make_model(tie_word_embeddings=False)


def test_plan_of_a_mixed_recipe(full, model):
    plan = make_plan(full, model, LAYERS)
    names = [f"{LAYERS}.{i}.{name}" for i in range(3) for name in ("self_attn.v_proj",)]
    assert not plan.layers.keys() & set(names) and len(plan.layers) == 21 - 3
    query = plan.layers[f"{LAYERS}.0.self_attn.q_proj"]
    assert query.scheme == Scheme(8, "channel", True, "float16") and query.method == GPTQ(damping=0.05)
    other = plan.layers[f"{LAYERS}.1.self_attn.q_proj"]
    assert other.scheme == query.scheme and other.method == GPTQ(damping=0.05, act_order=False)
    assert plan.layers[f"{LAYERS}.0.self_attn.k_proj"].scheme == Scheme(3, 64, True, "float16")
    down = plan.layers[f"{LAYERS}.2.mlp.down_proj"]
    assert (down.method, down.scheme, down.input) == (RTN(), Scheme(4, 16), InputScheme(8))
    assert down.shape == (48, 86)
    assert plan.layers[f"{LAYERS}.1.mlp.down_proj"].method == GPTQ(damping=0.05)
    ((name, _, allowed),) = plan.rewrites
    assert name == "awq" and len(allowed) == 18 and not any(n.endswith("down_proj") for n in allowed)


def test_later_overrides_win(model):
    overrides = [{"match": "*proj", "scheme": {"bits": 8}}, {"match": "*q_proj", "scheme": {"bits": 2}}]
    plan = make_plan(Recipe.load({"steps": [{"method": "rtn", "overrides": overrides}]}), model, LAYERS)
    bits = {name.rpartition(".")[2]: layer.scheme.bits for name, layer in plan.layers.items()}
    assert bits.pop("q_proj") == 2 and set(bits.values()) == {8}


def test_blocks_means_the_linears_inside(model):
    plan = make_plan(Recipe.load("w4a16-rtn"), model, LAYERS)
    assert len(plan.layers) == 21 and "lm_head" not in plan.layers
    everything = {"steps": [{"method": "rtn", "targets": ["blocks", "lm_head"]}]}
    plan = make_plan(Recipe.load(everything), model, LAYERS)
    assert list(plan.layers)[-1] == "lm_head" and len(plan.layers) == 22


def test_a_layer_has_one_solver(model):
    steps = [{"method": "rtn", "targets": ["*q_proj"]}, {"method": "gptq"}]
    with pytest.raises(RecipeError, match=r"layers\.0\.self_attn\.q_proj: both 'rtn' and 'gptq' would solve it"):
        make_plan(Recipe.load({"steps": steps}), model, LAYERS)
    steps[1]["ignore"] = ["*q_proj"]
    assert len(make_plan(Recipe.load({"steps": steps}), model, LAYERS).layers) == 21


def test_a_rewrite_comes_before_the_layers_it_rewrites_are_solved(model):
    first = {"method": "rtn", "targets": ["*down_proj"]}
    awq, rest = {"method": "awq", "ignore": ["*down_proj"]}, {"method": "gptq", "ignore": ["*down_proj"]}
    assert len(make_plan(Recipe.load({"steps": [first, awq, rest]}), model, LAYERS).layers) == 21
    with pytest.raises(RecipeError, match=r"step 'awq': 'rtn' has solved .*down_proj before it; put 'awq' first"):
        make_plan(Recipe.load({"steps": [first, {"method": "awq"}, rest]}), model, LAYERS)


@pytest.mark.parametrize("target", ["lm_head", "*embed_tokens", "head", "embeddings"])
def test_a_tied_pair_is_one_weight_under_any_name(target):
    tied = make_model(tie_word_embeddings=True)
    recipe = Recipe.load({"steps": [{"method": "rtn", "targets": [target]}]})
    assert list(make_plan(recipe, tied, LAYERS).layers) == ["model.embed_tokens"]


@pytest.mark.parametrize("target", ["embeddings", "head", "lm_head"])
def test_embeddings_that_scale_cannot_be_packed(target):
    gemma = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    recipe = Recipe.load({"steps": [{"method": "rtn", "targets": ["blocks", target]}]})
    with pytest.raises(RecipeError, match=r"model.embed_tokens, which shares .* lm_head, is a Gemma3TextScaled"):
        make_plan(recipe, gemma, LAYERS)


def test_embeddings_and_head_by_role():
    untied = make_model(tie_word_embeddings=False)
    recipe = Recipe.load({"steps": [{"method": "rtn", "targets": ["head", "embeddings"]}]})
    assert sorted(make_plan(recipe, untied, LAYERS).layers) == ["lm_head", "model.embed_tokens"]
    gpt2 = make_model("gpt2")
    assert list(make_plan(recipe, gpt2, "transformer.h").layers) == ["transformer.wte"]


@pytest.mark.parametrize(
    "setting",
    ["damping=-1", "damping=.nan", "refine=-1", "norm=0", "block_size=0", "block_size=-5", "steps=0"],
)
def test_impossible_method_settings_are_refused(setting):
    with pytest.raises(RecipeError, match=setting.partition("=")[0]):
        Recipe.load("w4a16-gptq").updated([setting])


@pytest.mark.parametrize(("recipe", "setting"), [("w4a16-awq", "grid=0"), ("w4a16-gptaq", "strength=1.5")])
def test_impossible_settings_of_other_methods_are_refused(recipe, setting):
    with pytest.raises(RecipeError, match=setting.partition("=")[0]):
        Recipe.load(recipe).updated([setting])


@pytest.mark.parametrize("name", ["w4a16-kv50", "w4-kv20-gptq"])
def test_folds_that_are_not_there_yet_are_said_to_be_missing(name):
    with pytest.raises(RecipeError, match="this version has no KV-cache folds"):
        Recipe.load(name)
