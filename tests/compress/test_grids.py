"""Grids from recipe to checkpoint and back: the plan, the proof, from_pretrained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import trifold
from tests.helpers import contents
from trifold.compress.recipe import Recipe
from trifold.core.errors import CheckpointError, RecipeError
from trifold.formats import FORMATS, bits_per_weight
from trifold.kernels import PackedEmbedding, PackedLinear

KINDS = {
    "nf4": ({"grid": "nf4", "group_size": 32}, "table"),
    "fp4": ({"grid": "fp4_e2m1", "group_size": 20, "scale_dtype": "float16"}, "table"),
    "fp8": ({"grid": "fp8_e4m3", "group_size": "channel"}, "fp8"),
    "real": ({"zero_point": "real", "bits": 3, "group_size": 32}, "affine"),
}
LAYER = "model.layers.1.mlp.up_proj"


def compress(folder, scheme, output, calibration=None, method="rtn", **more):
    recipe = {"steps": [{"method": method, "scheme": scheme, **more}]}
    return trifold.compress(folder, recipe, calibration, output, nsamples=8, seqlen=32, verbosity=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, dtype", [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_a_checkpoint_is_proved_loaded_and_counted(tmp_path, tiny, kind, family, dtype):
    scheme, name = KINDS[kind]
    report = compress(tiny(family, dtype), scheme, tmp_path / "out")
    model = trifold.load(tmp_path / "out")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed and {module.spec["format"] for module in packed.values()} == {name}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    size = total = 0
    for layer, module in packed.items():
        fmt = FORMATS.get(name)
        tensors = {leaf: stored[f"{layer}.{leaf}"] for leaf in fmt.layout(module.spec)}
        assert torch.equal(fmt.unpack(tensors, module.spec).dequantize(), module.dequantize())
        size, total = size + 8 * sum(t.nbytes for t in tensors.values()), total + module.dequantize().numel()
        assert report["layers"][layer]["bits_per_weight"] == bits_per_weight(module.spec)
    assert report["bits_per_weight"] == size / total
    ids = torch.arange(2, 12)[None]
    other = trifold.load(tmp_path / "out", dtype="bfloat16")
    assert torch.isfinite(model(ids).logits).all() and torch.isfinite(other(ids).logits).all()
    assert all(m.dequantize().equal(packed[n].dequantize()) for n, m in other.named_modules() if n in packed)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_same_recipe_same_bytes(tmp_path, tiny, text, kind):
    for name in ("a", "b"):
        compress(tiny(), KINDS[kind][0], tmp_path / name, text, "gptq")
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {k: v for k, v in one.items() if k != "report.json"} == {k: v for k, v in two.items() if k != "report.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_heads(tmp_path, tiny, kind):
    folder = tiny("llama", tie_word_embeddings=False)
    targets = ["blocks", "lm_head", "model.embed_tokens"]
    compress(folder, KINDS[kind][0], tmp_path / "out", targets=targets)
    model = trifold.load(tmp_path / "out")
    assert isinstance(model.model.embed_tokens, PackedEmbedding) and isinstance(model.lm_head, PackedLinear)
    table = model.model.embed_tokens
    assert torch.equal(table(torch.tensor([5, 7])), table.dequantize()[[5, 7]])
    assert torch.isfinite(model(torch.arange(2, 12)[None]).logits).all()


def test_damage_is_named(tmp_path, tiny):
    out = tmp_path / "out"
    compress(tiny(), KINDS["fp8"][0], out)
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    save_file({**tensors, f"{LAYER}.weight": tensors[f"{LAYER}.weight"].float()}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight holds codes, but as F32"):
        trifold.load(out)
    save_file(tensors, out / "model.safetensors")
    config["quantization_config"]["modules"][LAYER]["grid"] = "fp8_e5m2"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="unknown grid 'fp8_e5m2'"):
        trifold.load(out)


def test_a_grid_brings_its_bits():
    recipe = Recipe.load({"steps": [{"method": "rtn", "scheme": {"grid": "fp8_e4m3"}}]})
    scheme = recipe.steps[0].scheme
    assert (scheme.bits, scheme.symmetric) == (8, True)
    assert Recipe.load(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match="grid='nf4' has 4 bits, not bits=3"):
        Recipe.load({"steps": [{"method": "rtn", "scheme": {"grid": "nf4", "bits": 3}}]})
    with pytest.raises(RecipeError, match="unknown grid 'nf5'; did you mean nf4"):
        Recipe.load({"steps": [{"method": "rtn", "scheme": {"grid": "nf5"}}]})


def test_an_override_can_change_the_grid(tmp_path, tiny):
    overrides = [
        {"match": "*down_proj", "scheme": {"grid": "fp8_e4m3", "group_size": "channel"}},
        {"match": "*o_proj", "scheme": {"grid": "nf4"}},
        {"match": "*v_proj", "scheme": {"zero_point": "real"}},
    ]
    report = compress(tiny(), {"bits": 4, "group_size": 32}, tmp_path / "out", overrides=overrides)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    formats = {name.rsplit(".", 1)[1]: spec["format"] for name, spec in config["modules"].items()}
    assert formats == {
        **dict.fromkeys(("q_proj", "k_proj", "gate_proj", "up_proj"), "int"),
        "down_proj": "fp8",
        "o_proj": "table",
        "v_proj": "affine",
    }
    assert len(report["layers"]) == 21
