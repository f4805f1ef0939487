"""Rounded activations on the whole road: compress, write, prove, load, run; and channels with outliers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trifold
from tests.helpers import make_model, make_tokenizer, trifold_cli
from trifold.core.errors import CalibrationError
from trifold.kernels import PackedLinear

RUN = {"nsamples": 16, "seqlen": 32, "verbosity": -1}
IDS = torch.arange(2, 42).reshape(2, 20)
SHARED = Path(__file__).resolve().parents[3] / "shared"
PYCODE = SHARED / "models" / "pycode-5m"

RECIPES = [
    "w8a8",
    "w8a8-static",
    "w8a8-smoothquant",
    "w8a8-smoothquant-static",
    "w8a8-smoothquant-gptq",
    "w8a8-llmint8",
    "w8a8-llmint8-static",
    "w8a8-fp8",
    "w8a8-fp8-static",
]
NEEDS_TEXT = [name for name in RECIPES if name not in ("w8a8", "w8a8-fp8")]
SPLITS = ["threshold=1.5"]  # tiny models have no outliers of 6


def compressed(out, folder, text, recipe, **more):
    settings = SPLITS if "llmint8" in recipe else []
    report = trifold.compress(folder, recipe, text, out, **{"settings": settings, **RUN, **more})
    return out, report


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


def specs(out):
    return json.loads((out / "config.json").read_text())["quantization_config"]["modules"]


def widen(model, factor, channels):
    """Make some channels of every norm's output larger by `factor`, without changing the function."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[channels] *= factor
                for reader in readers:
                    reader.weight[:, channels] /= factor
    return model


# -- every recipe on two families ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_reload_passes_the_proof_and_stays_close_to_dense(tmp_path, tiny, text, family, recipe):
    folder = tiny(family)
    out, report = compressed(tmp_path / "out", folder, text, recipe)
    assert report["proof"]["relative_l2"] <= 2e-2
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert 0 < distance(logits(model), logits(dense)) < (0.2 if "static" in recipe or "fp8" in recipe else 0.1)
    modules = specs(out)
    assert len(modules) == len(report["layers"]) == 3 * (4 if family == "gpt2" else 7)
    if "llmint8" in recipe:
        split = [spec for spec in modules.values() if spec["format"] == "split"]
        assert split and all("input" in s["parts"][0] and "input" not in s["parts"][1] for s in split)
    tensors = load_file(out / "model.safetensors")
    assert report["total_bytes"] == sum(t.nbytes for t in tensors.values())
    packed = sum(t.nbytes for n, t in tensors.items() if any(n.startswith(f"{name}.") for name in modules))
    packed -= sum(t.nbytes for n, t in tensors.items() if n.endswith(".bias") and n.removesuffix(".bias") in modules)
    assert report["bits_per_weight"] == 8 * packed / sum(s["shape"][0] * s["shape"][1] for s in modules.values())
    code, listing, _ = trifold_cli("inspect", out)
    assert code == 0 and ("a8" in listing)


@pytest.mark.parametrize("recipe", ["w8a8-smoothquant-static", "w8a8-llmint8", "w8a8-fp8"])
def test_bf16_models_and_determinism(tmp_path, tiny, text, recipe):
    folder = tiny("llama", torch.bfloat16)
    first, report = compressed(tmp_path / "a", folder, text, recipe)
    second, _ = compressed(tmp_path / "b", folder, text, recipe)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    model = trifold.load(first)
    assert model.dtype == torch.bfloat16 and report["proof"]["kl"] <= 1e-3
    assert distance(logits(model).float(), logits(AutoModelForCausalLM.from_pretrained(folder)).float()) < 0.2


@pytest.mark.parametrize("recipe", ["w8a8-static", "w8a8-llmint8"])
def test_a_live_model_equals_the_checkpoint(tmp_path, tiny, text, recipe):
    out, _ = compressed(tmp_path / "out", tiny(), text, recipe)
    live = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    settings = SPLITS if "llmint8" in recipe else []
    trifold.compress(live, recipe, text, tokenizer=make_tokenizer(), settings=settings, **RUN)
    torch.testing.assert_close(logits(live), logits(trifold.load(out)))
    live.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(trifold.load(tmp_path / "saved")), logits(live))


# -- static scales -------------------------------------------------------------------------------------------


def test_static_scales_are_stored_loaded_and_used(tmp_path, tiny, text):
    out, _ = compressed(tmp_path / "out", tiny(), text, "w8a8-static")
    file = out / "model.safetensors"
    tensors = load_file(file)
    scales = {n: t for n, t in tensors.items() if n.endswith(".input_scale")}
    assert len(scales) == 21 and all(t.shape == (1,) and t.dtype == torch.float32 for t in scales.values())
    qkv = [float(tensors[f"model.layers.0.self_attn.{n}_proj.input_scale"]) for n in "qkv"]
    assert len(set(qkv)) == 1 and len({float(t) for t in scales.values()}) == 12
    before = logits(trifold.load(out))
    for scale in scales.values():
        scale *= 8
    save_file(tensors, file, {"format": "pt"})
    assert distance(logits(trifold.load(out)), before) > 0.05
    del tensors["model.layers.1.mlp.up_proj.input_scale"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(trifold.core.errors.CheckpointError, match=r"up_proj\.input_scale is missing"):
        trifold.load(out)


def test_a_static_scale_is_the_largest_of_calibration(tmp_path, tiny, text):
    """Of the first block's q_proj, whose input nothing before has changed."""
    model = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    seen = []
    module = model.model.layers[0].self_attn.q_proj
    module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].abs().max()))
    ids = [torch.arange(2, 34), torch.arange(40, 72)]
    for sample in ids:
        logits(model, sample[None])
    report = trifold.compress(tiny(), "w8a8-static", ids, tmp_path / "out", **RUN)
    assert report["calibration"]["windows"] == 2
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.input_scale"]
    torch.testing.assert_close(scale[0], max(seen) / 127)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_later_layers_are_calibrated_on_rounded_activations(tmp_path, tiny, text, true_sequential):
    """Coarser activations in front change the scales behind."""
    scales = []
    for bits in (8, 3):
        settings = [f"input.bits={bits}", f"true_sequential={true_sequential}"]
        out = tmp_path / f"out{bits}"
        trifold.compress(tiny(), "w8a8-static", text, out, settings=settings, **RUN)
        tensors = load_file(out / "model.safetensors")
        scales.append(
            {n: float(t) * (127 if bits == 8 else 3) for n, t in tensors.items() if n.endswith(".input_scale")}
        )
    first = "model.layers.0.self_attn.q_proj.input_scale"
    assert scales[0][first] == pytest.approx(scales[1][first], rel=1e-6)
    behind = [n for n in scales[0] if "layers.0." not in n]
    assert all(scales[0][n] != pytest.approx(scales[1][n], rel=1e-4) for n in behind)
    inside = "model.layers.0.mlp.down_proj.input_scale"
    assert (scales[0][inside] != pytest.approx(scales[1][inside], rel=1e-4)) is true_sequential


@pytest.mark.parametrize("recipe", NEEDS_TEXT)
def test_without_text_they_are_refused(tmp_path, tiny, recipe):
    with pytest.raises(CalibrationError, match="needs calibration text") as caught:
        trifold.compress(tiny(), recipe, output=tmp_path / "out", verbosity=-1)
    if recipe == "w8a8-static":
        assert "static activation scales (input.static=false finds them at run time)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_calibration_never_reached_finds_its_scales_at_run_time(tmp_path, text):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()  # so that down_proj sees nothing but zeros
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    out, report = compressed(tmp_path / "out", tmp_path / "model", text, "w8a8-static")
    name = "model.layers.1.mlp.down_proj"
    assert specs(out)[name]["input"] == {"bits": 8} and "at run time" in report["layers"][name]["input"]
    assert sum("static" in spec["input"] for spec in specs(out).values()) == 20


# -- outliers ------------------------------------------------------------------------------------------------


def test_outlier_channels_break_plain_rounding_alone(tmp_path, text):
    plain = make_model(hidden_size=96, intermediate_size=172)
    reference = logits(plain)
    wide = widen(make_model(hidden_size=96, intermediate_size=172), 30, [5, 50])
    torch.testing.assert_close(logits(wide), reference, rtol=1e-4, atol=1e-3)  # the same function
    for name, model in (("plain", plain), ("wide", wide)):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    errors = {}
    for recipe in ("w8a8", "w8a8-static", "w8a8-smoothquant", "w8a8-smoothquant-static", "w8a8-llmint8", "w8a8-fp8"):
        for name in ("plain", "wide"):
            out = tmp_path / f"{recipe}-{name}"
            trifold.compress(tmp_path / name, recipe, text, out, **RUN)
            errors[recipe, name] = distance(logits(trifold.load(out)), reference)
    for recipe in ("w8a8", "w8a8-static"):
        assert errors[recipe, "wide"] > 4 * errors[recipe, "plain"]
    for recipe in ("w8a8-smoothquant", "w8a8-llmint8"):
        assert errors[recipe, "wide"] < 0.25 * errors["w8a8", "wide"]
        assert errors[recipe, "wide"] < 2 * errors["w8a8", "plain"]
    assert errors["w8a8-smoothquant-static", "wide"] < 0.25 * errors["w8a8-static", "wide"]
    assert errors["w8a8-fp8", "wide"] < 2 * errors["w8a8-fp8", "plain"]  # floats keep small numbers beside large ones
    kept = [spec for spec in specs(tmp_path / "w8a8-llmint8-wide").values() if spec["format"] == "split"]
    assert len(kept) == 15 and all(spec["parts"][1]["shape"][1] == 2 for spec in kept)


@pytest.mark.skipif(not PYCODE.is_dir(), reason="needs the model pycode-5m")
def test_on_a_trained_model(tmp_path):
    """Perplexity on held-out text; with outliers x 30 on four channels only plain rounding is far off."""
    text, held_out = (SHARED / "data" / "pycode" / f"{name}.jsonl" for name in ("calib", "eval"))
    windows = {"seqlen": 128, "max_windows": 32, "dtype": "float32", "batch_size": 16, "speed": False}
    wide = widen(AutoModelForCausalLM.from_pretrained(PYCODE, dtype=torch.float32), 30, [3, 67, 131, 195])
    wide.save_pretrained(tmp_path / "wide")
    for file in PYCODE.glob("token*"):
        (tmp_path / "wide" / file.name).write_bytes(file.read_bytes())

    def rise(model, recipe):
        out = tmp_path / f"{recipe}-{Path(model).name}"
        trifold.compress(model, recipe, text, out, nsamples=8, seqlen=128, dtype="float32", verbosity=-1)
        return trifold.evaluate(str(out), str(held_out), **windows).perplexity / dense - 1

    dense = trifold.evaluate(str(tmp_path / "wide"), str(held_out), **windows).perplexity
    assert rise(PYCODE, "w8a8-fp8") < 0.005
    for recipe in ("w8a8-smoothquant", "w8a8-llmint8"):
        assert rise(tmp_path / "wide", recipe) < 0.002
    assert rise(tmp_path / "wide", "w8a8") > 0.008


def test_packed_linears_hold_no_dense_copy(tmp_path, tiny, text):
    out, report = compressed(tmp_path / "out", tiny(), text, "w8a8-llmint8")
    model = trifold.load(out)
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert sum(held.values()) - rotary == report["total_bytes"]
    logits(model)
    parts = [m for m in model.modules() if isinstance(m, PackedLinear) and "parts" in m.spec]
    assert parts and all({"order"} == {n.removeprefix("runtime_") for n in m._buffers} for m in parts)
