"""Mixtures of experts through the whole pipeline."""

import copy
import json

import pytest
import torch

import trifold
from tests.helpers import contents, make_model, make_tokenizer
from trifold.kernels import PackedExperts, PackedLinear

DEAD = (1, 3)
TEXTS = [torch.randint(2, 128, (16,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
OPTIONS = {"nsamples": 8, "seqlen": 16, "verbosity": -1, "batch_size": 3}


def starved(family, seed=0):
    """A model whose router never chooses the DEAD experts: their score falls with a feature that is always large."""
    model = make_model(family, seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 20.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = 0.0
            layer.mlp.gate.weight[list(DEAD), 0] = -100.0
    return model


def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model):
    with torch.no_grad():
        return model(torch.stack(TEXTS)).logits


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-gptaq", "w8a16", "w8a8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_see_no_token(family, recipe, tmp_path):
    model = starved(family)
    dense, out = folder(tmp_path, model), tmp_path / "out"
    trifold.compress(dense, recipe, TEXTS, output=out, settings=["min_expert_tokens=8"], **OPTIONS)
    report = json.loads((out / "report.json").read_text())
    for index in range(2):
        for e in range(4):
            for leaf in ("up", "down"):
                entry = report["layers"][f"model.layers.{index}.mlp.experts.{e}.{leaf}"]
                if recipe in ("w8a16", "w8a8"):
                    assert "tokens" in entry and entry["error_of"] == "output"
                else:
                    assert (entry["tokens"] == 0) is (e in DEAD)
                    assert entry.get("shown_all_tokens", False) is (entry["tokens"] < 8)
                assert entry["error"] < 0.1
    packed = trifold.load(out)
    experts = [m for m in packed.modules() if isinstance(m, PackedExperts)]
    assert len(experts) == 2
    assert all(isinstance(expert.up, PackedLinear) for m in experts for expert in m.children())
    distance = (logits(packed) - logits(model)).norm() / logits(model).norm()
    assert distance < (0.4 if "w4" in recipe else 0.05)


@pytest.mark.parametrize("recipe", ["w4a16-awq", "w8a8-smoothquant", "w8a8-llmint8", "w8a8-static"])
@pytest.mark.parametrize("floor", [0, 8])
def test_other_methods_take_experts_without_tokens(recipe, floor, tmp_path):
    model = starved("mixtral")
    dense, out = folder(tmp_path, model), tmp_path / "out"
    report = trifold.compress(dense, recipe, TEXTS, output=out, settings=[f"min_expert_tokens={floor}"], **OPTIONS)
    assert report["layers"]["model.layers.0.mlp.experts.1.up"]["tokens"] == 0
    distance = (logits(trifold.load(out)) - logits(model)).norm() / logits(model).norm()
    assert distance < (0.4 if "w4" in recipe else 0.06)


def test_in_place(tmp_path):
    model = make_model("mixtral")
    dense, out = folder(tmp_path, model), tmp_path / "out"
    trifold.compress(dense, "w4a16-gptq", TEXTS, output=out, **OPTIONS)
    trifold.compress(model, "w4a16-gptq", TEXTS, inplace=True, **OPTIONS)
    assert torch.equal(logits(model), logits(trifold.load(out)))


def test_a_dead_expert_is_solved_on_what_all_tokens_give(tmp_path):
    """Its weights are as good for the layer's tokens as those of an expert with tokens of its own."""
    model = starved("mixtral")
    own = trifold.compress(
        copy.deepcopy(model), "w2a16-gptq", TEXTS, settings=["min_expert_tokens=8", "group_size=16"], **OPTIONS
    )
    plain = trifold.compress(copy.deepcopy(model), "w2a16-rtn", TEXTS, settings=["group_size=16"], **OPTIONS)
    x = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _m, args: x.append(args[0]))
    logits(model)
    weight = model.model.layers[0].mlp.experts.gate_up_proj[DEAD[0]].detach()

    def error(compressed):
        packed = compressed.model.layers[0].mlp.experts.get_submodule(f"{DEAD[0]}.up").dequantize()
        return float((x[0] @ (packed - weight).T).norm() / (x[0] @ weight.T).norm())

    assert error(own) < 0.8 * error(plain)


def test_the_notice_names_them(tmp_path, capsys):
    dense = folder(tmp_path, starved("mixtral"))
    options = {**OPTIONS, "verbosity": 0}
    trifold.compress(dense, "w4a16-gptq", TEXTS, output=tmp_path / "out", settings=["min_expert_tokens=8"], **options)
    said = "".join(capsys.readouterr())
    assert "model.layers.0.mlp.experts: fewer than 8 tokens reached expert 1 (0), 3 (0)" in " ".join(said.split())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_reload_and_save_again(family, tmp_path):
    dense, out = folder(tmp_path, make_model(family)), tmp_path / "out"
    trifold.compress(dense, "w4a16-rtn", TEXTS, output=out, settings=["group_size=16"], **OPTIONS)
    packed = trifold.load(out)
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(trifold.load(tmp_path / "again")), logits(packed))


def test_some_experts_may_stay_dense(tmp_path):
    model = make_model("gpt_oss")
    dense, out = folder(tmp_path, model), tmp_path / "out"
    settings = ["ignore=['*.experts.2.*', '*.experts.3.down']", "group_size=16"]
    trifold.compress(dense, "w8a16", TEXTS, output=out, settings=settings, **OPTIONS)
    packed = trifold.load(out)
    mixture = packed.model.layers[0].mlp.experts
    stacked = model.model.layers[0].mlp.experts
    assert torch.equal(mixture.get_submodule("2.up").weight, stacked.gate_up_proj[2].T)
    assert torch.equal(mixture.get_submodule("3.down").bias, stacked.down_proj_bias[3])
    assert isinstance(mixture.get_submodule("3.up"), PackedLinear)
    assert (logits(packed) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_in_memory_is_the_same_as_through_files(tmp_path):
    model = make_model("qwen3_moe")
    dense, out = folder(tmp_path, model), tmp_path / "out"
    trifold.compress(dense, "w4a16-gptq", TEXTS, output=out, **OPTIONS)
    before = logits(model)
    live = trifold.compress(model, "w4a16-gptq", TEXTS, **OPTIONS)
    assert torch.equal(logits(live), logits(trifold.load(out)))
    assert not torch.equal(logits(live), before)


def test_the_same_bytes_again(tmp_path):
    dense = folder(tmp_path, starved("mixtral"))
    for name in ("a", "b"):
        trifold.compress(dense, "w4a16-gptq", TEXTS, output=tmp_path / name, **OPTIONS)
    a, b = (contents(tmp_path / name) for name in ("a", "b"))
    assert {k: v for k, v in a.items() if k != "report.json"} == {k: v for k, v in b.items() if k != "report.json"}
