"""The whole road on tiny models: compress, reload, the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trifold
from tests.helpers import make_model, make_tokenizer
from trifold.compress import runner
from trifold.core.linears import set_weight
from trifold.formats import FORMATS
from trifold.kernels import PackedLinear

RUN = {"nsamples": 16, "seqlen": 32, "verbosity": -1}
IDS = torch.arange(2, 42).reshape(2, 20)


def compressed(tmp_path, folder, text, recipe="w4a16-gptq", **more):
    out = tmp_path / "out"
    report = trifold.compress(folder, recipe, text, out, **{"settings": ["group_size=32"], **RUN, **more})
    return out, report


def dequantised(folder, out, dtype=torch.float32):
    """The dense model with every packed weight replaced by its dequantised value."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = load_file(out / "model.safetensors")
    state = dense.state_dict()
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] not in config["modules"] or not name.rpartition(".")[2].startswith("weight"):
            state[name].copy_(tensor)
    for name, spec in config["modules"].items():
        parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in FORMATS.get(spec["format"]).layout(spec)}
        weight = FORMATS.get(spec["format"]).unpack(parts, spec).dequantize()
        set_weight(dense.get_submodule(name), weight)
    return dense.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "olmo2"])
@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-awq", "w3a16-awq-gptq", "w2a16-rtn"])
def test_reload_gives_the_promised_logits(tmp_path, tiny, text, family, recipe):
    folder = tiny(family)
    out, report = compressed(tmp_path, folder, text, recipe)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == len(report["layers"]) == 3 * (4 if family == "gpt2" else 7)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dequantised(folder, out)(IDS).logits, atol=1e-4, rtol=1e-4)
    assert report["proof"]["max_abs"] <= 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "olmo2"])
def test_w8a8_reloads_and_stays_close_to_dense(tmp_path, tiny, text, family):
    folder = tiny(family)
    out, _ = compressed(tmp_path, folder, text, "w8a8", settings=())
    dense, model = AutoModelForCausalLM.from_pretrained(folder), trifold.load(out)
    assert all(m.spec["input"] == {"bits": 8} for m in model.modules() if isinstance(m, PackedLinear))
    with torch.no_grad():
        a, b = dense(IDS).logits, model(IDS).logits
    assert 0 < (a - b).norm() / a.norm() < 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_awq_folds_keep_the_function(tmp_path, tiny, text, family):
    """At 8 bits what remains is rounding: a wrong fold would change the logits wholesale."""
    folder = tiny(family)
    out, report = compressed(tmp_path, folder, text, "w8a16", settings=["group_size=32"])
    recipe = {"steps": [{"method": "awq"}, {"method": "rtn", "scheme": {"bits": 8, "group_size": 32}}]}
    folded = tmp_path / "folded"
    report = trifold.compress(folder, recipe, text, folded, **RUN)
    assert any(e["awq"]["scaling"] != "none" for e in report["layers"].values() if "awq" in e)
    dense, plain, model = AutoModelForCausalLM.from_pretrained(folder), trifold.load(out), trifold.load(folded)
    with torch.no_grad():
        reference = dense(IDS).logits
        distance = [float((m(IDS).logits - reference).norm() / reference.norm()) for m in (plain, model)]
    assert distance[1] < 2 * distance[0] < 0.1


def test_bf16_model_stays_bf16_and_passes_its_proof(tmp_path, tiny, text):
    out, report = compressed(tmp_path, tiny("llama", torch.bfloat16), text)
    model = trifold.load(out)
    assert model.dtype == torch.bfloat16 and report["dtype"] == "bfloat16"
    assert report["proof"]["kl"] <= 1e-3


def test_two_runs_are_byte_identical(tmp_path, tiny, text):
    first, _ = compressed(tmp_path / "a", tiny(), text, "w3a16-awq-gptq")
    second, _ = compressed(tmp_path / "b", tiny(), text, "w3a16-awq-gptq")
    files = sorted(p.name for p in first.iterdir() if p.name != "report.json")
    assert files == sorted(p.name for p in second.iterdir() if p.name != "report.json")
    assert "LICENSE" in files and "tokenizer.json" in files and "model.safetensors" in files
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_true_sequential_and_remembered_outputs_change_only_what_they_should(tmp_path, tiny, text, monkeypatch):
    """Remembering outputs is a shortcut: without it the bytes are the same."""
    first, _ = compressed(tmp_path / "a", tiny(), text)
    monkeypatch.setattr(runner, "MEMORY_SHARE", 0.0)
    second, _ = compressed(tmp_path / "b", tiny(), text)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    third, _ = compressed(tmp_path / "c", tiny(), text, settings=["group_size=32", "true_sequential=false"])
    assert (first / "model.safetensors").read_bytes() != (third / "model.safetensors").read_bytes()


def test_sharded_source_and_output(tmp_path, text):
    from tests.helpers import save_model

    whole, parts = save_model(tmp_path / "whole"), save_model(tmp_path / "parts", shard="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    a, _ = compressed(tmp_path / "a", whole, text)
    b, _ = compressed(tmp_path / "b", parts, text, max_shard_size="20KB")
    index = json.loads((b / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in b.glob("*.safetensors"):
        tensors.update(load_file(file))
    expected = load_file(a / "model.safetensors")
    assert tensors.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(trifold.load(a)(IDS).logits, trifold.load(b)(IDS).logits)


def test_live_model_is_changed_only_at_completion(tiny, text):
    model, tokenizer = make_model(), make_tokenizer()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(trifold.core.errors.CalibrationError):
        trifold.compress(model, "w4a16-gptq", None, tokenizer=tokenizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.train()
    result = trifold.compress(model, "w4a16-gptq", text, tokenizer=tokenizer, settings=["group_size=32"], **RUN)
    assert result is model and model.training
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 21


@pytest.mark.parametrize("inplace", [False, True])
def test_live_model_equals_the_checkpoint_route(tmp_path, tiny, text, inplace):
    out, _ = compressed(tmp_path, tiny(), text)
    live = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    trifold.compress(
        live, "w4a16-gptq", text, tokenizer=make_tokenizer(), settings=["group_size=32"], inplace=inplace, **RUN
    )
    with torch.no_grad():
        torch.testing.assert_close(live(IDS).logits, trifold.load(out)(IDS).logits)
    saved = tmp_path / "saved"
    live.save_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(trifold.load(saved)(IDS).logits, live(IDS).logits)


def test_save_pretrained_of_a_loaded_checkpoint_writes_the_same_tensors(tmp_path, tiny, text):
    out, _ = compressed(tmp_path, tiny(), text)
    trifold.load(out).save_pretrained(tmp_path / "again")
    a, b = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_generate_and_dtypes(tmp_path, tiny, text):
    out, _ = compressed(tmp_path, tiny(), text)
    ids = IDS[:1, :5]
    outputs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, device_map={"": "cpu"})
        assert model.dtype == dtype
        scales = [b.dtype for n, b in model.named_buffers() if n.endswith("weight_scale")]
        assert set(scales) == {torch.bfloat16}
        outputs.append(model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))
        assert outputs[-1].shape == (1, 11)
        with torch.no_grad():
            assert model(ids).logits.dtype == dtype


def test_no_dense_copy_of_a_packed_weight_is_kept(tmp_path, tiny, text):
    out, report = compressed(tmp_path, tiny(), text)
    model = trifold.load(out)
    with torch.no_grad():
        model(IDS)
    held = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert report["total_bytes"] <= held - rotary <= 1.1 * report["total_bytes"]  # kernels fill up groups and rows


def test_bits_are_what_is_stored(tmp_path, tiny, text):
    out, report = compressed(tmp_path, tiny(), text)
    tensors = load_file(out / "model.safetensors")
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    packed = sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] in modules)
    weights = sum(s["shape"][0] * s["shape"][1] for s in modules.values())
    assert report["bits_per_weight"] == 8 * packed / weights
    assert report["total_bytes"] == sum(t.nbytes for t in tensors.values())


def test_untied_head_can_be_addressed_by_pattern(tmp_path, tiny, text):
    folder = tiny("llama", tie_word_embeddings=False)
    recipe = {
        "steps": [
            {"method": "gptq", "scheme": {"bits": 4, "group_size": 32}},
            {"name": "head", "method": "gptq", "targets": ["lm_head"], "scheme": {"bits": 8, "group_size": 16}},
        ]
    }
    out, report = compressed(tmp_path, folder, text, recipe, settings=())
    assert report["layers"]["lm_head"]["error"] < 1e-4
    model = trifold.load(out)
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.spec["bits"] == 8
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dequantised(folder, out)(IDS).logits, atol=1e-4, rtol=1e-4)


def test_gptq_beats_awq_beats_rtn_on_output_error(tmp_path, tiny, text):
    errors = {}
    for recipe in ("w3a16-rtn", "w3a16-awq", "w3a16-gptq"):
        _, report = compressed(tmp_path / recipe, tiny(), text, recipe)
        errors[recipe] = report["mean_error"]
    assert errors["w3a16-gptq"] < 0.8 * errors["w3a16-awq"] < 0.8 * errors["w3a16-rtn"]
