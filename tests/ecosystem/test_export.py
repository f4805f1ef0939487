"""Checkpoints as other engines load them: written, read back, run; refused before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import trifold
from tests.helpers import compressed_once, contents, save_model, trifold_cli
from trifold.compress import export as exporting
from trifold.compress.packed_folder import open_packed
from trifold.core.errors import CheckpointError, InputError
from trifold.kernels import PackedLinear

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LAYER = "model.layers.1.mlp.up_proj"


def recipe(bits=4, group_size=32, **rest):
    scheme = {"bits": bits, "group_size": group_size, "scale_dtype": "float16", **rest}
    return {"steps": [{"method": "rtn", "scheme": scheme}]}


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    return compressed_once(tmp_path_factory, lambda *args, **config: save_model(*args, **{**SIZES, **config}))


def logits(folder):
    with torch.no_grad():
        return trifold.load(folder)(torch.arange(2, 42).reshape(2, 20)).logits


def codes(folder):
    packed = open_packed(folder)
    return {name: packed.weight(name) for name in packed.modules}


FORMATS = [
    ("compressed-tensors", recipe(), "pack-quantized"),
    ("pack-quantized", recipe(3, symmetric=True), "pack-quantized"),
    ("pack-quantized", recipe(8, "channel", symmetric=True), "pack-quantized"),
    ("int-quantized", recipe(8, "tensor", symmetric=True), "int-quantized"),
    ("compressed-tensors", "w8a8", "int-quantized"),
    ("compressed-tensors", "w8a8-fp8", "float-quantized"),
    ("compressed-tensors", "w8a16-fp8", "float-quantized"),
    ("gptq", recipe(3, symmetric=True), "gptq"),
    ("gptq_v2", recipe(2), "gptq_v2"),
    ("awq", recipe(4), "awq"),
]


@pytest.mark.parametrize(("to", "chosen", "layout"), FORMATS, ids=str)
def test_an_export_has_every_code_and_runs_packed(tmp_path, folds, to, chosen, layout):
    fold = folds(chosen, tie_word_embeddings=True)
    report = trifold.export(fold, to, tmp_path / "out")
    assert report["layers"] == {layout: 14} and not (tmp_path / "out.partial").exists()
    files = contents(tmp_path / "out")
    assert report["total_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert {"tokenizer.json", "LICENSE", "generation_config.json"} <= files.keys() and "report.json" not in files
    ours, theirs = codes(fold), codes(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.dequantize(), theirs[name].dequantize()), name
    assert isinstance(trifold.load(tmp_path / "out").get_submodule(LAYER), PackedLinear)
    expected, bound = logits(fold), 0.05 if chosen == "w8a8" else 1e-4  # their rule for activations is another
    assert (logits(tmp_path / "out") - expected).norm() < bound * expected.norm()
    again = tmp_path / "again"
    trifold.export(fold, to, again)
    assert contents(again) == files


@pytest.mark.parametrize("chosen", ["w4a16-nf4", "w8a8-llmint8", recipe()], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_fold_becomes_dense(tmp_path, text, family, chosen):
    config = {"n_embd": 64, "n_inner": 96, "n_layer": 2} if family == "gpt2" else SIZES
    fold = tmp_path / "fold"
    save_model(tmp_path / "dense", family, **config)
    calibration = text if chosen == "w8a8-llmint8" else None
    trifold.compress(tmp_path / "dense", chosen, calibration, fold, verbosity=-1, nsamples=4, seqlen=16)
    trifold.export(fold, "dense", tmp_path / "out")
    packed, dense = trifold.load(fold), trifold.load(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear) and "." in name and ".parts." not in name:
            weight = dense.get_submodule(name).weight
            assert torch.equal(weight.T if family == "gpt2" else weight, module.dequantize()), name
    trifold.export(fold, "dense", tmp_path / "half", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_their_index(tmp_path, folds):
    trifold.export(folds(recipe()), "awq", tmp_path / "one")
    trifold.export(folds(recipe()), "awq", tmp_path / "many", max_shard_size=30_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


def test_gptq_to_compressed_tensors_and_back_keeps_every_code(tmp_path, folds):
    trifold.export(folds(recipe()), "gptq_v2", tmp_path / "gptq")
    trifold.export(tmp_path / "gptq", "pack-quantized", tmp_path / "ct")
    trifold.export(tmp_path / "ct", "awq", tmp_path / "awq")
    trifold.export(tmp_path / "awq", "gptq_v2", tmp_path / "back")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("gptq", "back"))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("gptq", "back")]
    assert config[0] == config[1]
    assert json.loads((tmp_path / "back" / "quantize_config.json").read_text()) == config[0]["quantization_config"]


def act_order(folder, biases=False):
    """A GPTQ checkpoint whose columns have changed groups; also the dense weight that one of its layers stands for."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]
        if biases:
            scales = tensors[name.replace("g_idx", "scales")]
            tensors[name.replace("g_idx", "bias")] = torch.zeros(scales.shape[1], dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    group, scales = tensors[f"{LAYER}.g_idx"].long(), tensors[f"{LAYER}.scales"].float()
    rows = tensors[f"{LAYER}.qweight"].long() & 0xFFFFFFFF
    values = torch.stack([rows >> 4 * k & 15 for k in range(8)], dim=1).reshape(-1, scales.shape[1])
    zeros = tensors[f"{LAYER}.qzeros"].long() & 0xFFFFFFFF
    zeros = torch.stack([zeros >> 4 * k & 15 for k in range(8)], dim=2).reshape(len(scales), -1)
    return ((values - zeros[group]) * scales[group]).T


def test_act_order_runs_packed_but_has_no_other_home(tmp_path, folds):
    trifold.export(folds(recipe()), "gptq_v2", tmp_path / "gptq")
    expected = act_order(tmp_path / "gptq", biases=True)
    model = trifold.load(tmp_path / "gptq")
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, PackedLinear) and torch.equal(layer.dequantize(), expected)
    trifold.export(tmp_path / "gptq", "dense", tmp_path / "dense")
    assert torch.allclose(logits(tmp_path / "gptq"), logits(tmp_path / "dense"), atol=1e-4)
    with pytest.raises(InputError, match=r"gptq cannot hold it: it is split\(.*--to dense can"):
        trifold.export(tmp_path / "gptq", "gptq", tmp_path / "no")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "gptq"))


def test_a_bias_that_the_model_has_no_place_for(tmp_path, folds):
    trifold.export(folds(recipe()), "gptq_v2", tmp_path / "gptq")
    act_order(tmp_path / "gptq", biases=True)
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    tensors[f"{LAYER}.bias"] += 1
    save_file(tensors, tmp_path / "gptq" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 unexpected tensor.*{LAYER}.bias"):
        trifold.load(tmp_path / "gptq")


def test_a_config_without_dtype(tmp_path, folds):
    fold = folds(recipe(), dtype=torch.bfloat16)
    trifold.export(fold, "gptq", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    model = trifold.load(tmp_path / "gptq")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 1
    assert trifold.load(tmp_path / "gptq", dtype="float32").dtype == torch.float32
    trifold.export(tmp_path / "gptq", "dense", tmp_path / "dense")
    assert {t.dtype for t in load_file(tmp_path / "dense" / "model.safetensors").values()} == {torch.bfloat16}


EXPERTS = {
    "mixtral": ("model.layers.1.block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq_v2", "awq", "dense"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_go_out_apart_and_come_back_together(tmp_path, folds, family, to):
    config = {"num_experts_per_tok": 2, "intermediate_size": 64}
    if family == "deepseek_v3":  # heads and latents of sizes that groups divide
        config |= {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}
    fold = folds(recipe(group_size=16), family, **config)
    trifold.export(fold, to, tmp_path / "out")
    mixture, gate, up, down = EXPERTS[family]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{mixture}.gate.weight" in tensors
    found = {name.split(".")[-2] for name in tensors if name.startswith(f"{mixture}.experts.3.")}
    assert found == {gate, up, down} and not any("experts.3.up." in name for name in tensors)
    assert torch.allclose(logits(tmp_path / "out"), logits(fold), atol=1e-4)
    if to == "dense":
        return
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stays = {"compressed-tensors": "ignore", "awq": "modules_to_not_convert"}.get(to)
    assert stays is None or {"lm_head", f"{mixture}.gate"} <= set(block[stays])
    ours, theirs = codes(fold), codes(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight.dequantize(), theirs[name].dequantize()) for name, weight in ours.items())
    trifold.export(tmp_path / "out", to, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)


def test_an_expert_that_is_quantised_by_half_is_refused(tmp_path, folds):
    trifold.export(folds(recipe(group_size=16), "mixtral"), "awq", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    half = "model.layers.1.block_sparse_moe.experts.0.w3"
    save_file({k: t for k, t in tensors.items() if not k.startswith(half)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1 is quantised, but not its gate or up"):
        trifold.load(tmp_path / "out")


def test_the_commands_take_an_import(tmp_path, folds, text):
    fold = folds(recipe())
    code, stdout, _ = trifold_cli("export", fold, "--to", "awq", "-o", tmp_path / "awq", "--json", "-")
    assert code == 0 and json.loads(stdout)["layers"] == {"awq": 14}
    code, stdout, _ = trifold_cli("inspect", tmp_path / "awq", "--json", "-")
    theirs = json.loads(stdout)
    code, stdout, _ = trifold_cli("inspect", fold, "--json", "-")
    assert code == 0 and theirs["bits_per_weight"] == json.loads(stdout)["bits_per_weight"]
    assert theirs["layers"][LAYER]["describe"] == "int4 g32 asym"
    code, stdout, _ = trifold_cli("inspect", tmp_path / "awq", "--kernels", "--json", "-")
    assert code == 0 and LAYER in json.loads(stdout)["kernels"]
    options = (
        "--text",
        text,
        "--seqlen",
        32,
        "--max-windows",
        4,
        "--baseline",
        fold,
        "--no-speed",
        "-q",
        "--json",
        "-",
    )
    code, stdout, _ = trifold_cli("eval", tmp_path / "awq", *options)
    assert code == 0 and json.loads(stdout)["kl"] < 1e-6
    sizes = ("--batch-size", 1, "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)
    assert trifold_cli("bench", tmp_path / "awq", *sizes)[0] == 0
    code, stdout, _ = trifold_cli("generate", tmp_path / "awq", "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert code == 0 and stdout == trifold_cli("generate", fold, "--prompt", "w1 w2", "--max-new-tokens", 3)[1]


REFUSALS = [
    ("awq", recipe(3), {}, "layers.0.self_attn.q_proj: awq cannot hold it: it has 3 bits, not 4; --to pack-quantized"),
    ("gptq", recipe(), {"intermediate_size": 80}, "down_proj: .* groups of 32 do not divide its 80 inputs; --to dense"),
    ("pack-quantized", "w4a16-nf4", {}, "its values are those of nf4, not integers; --to dense can"),
    ("pack-quantized", "w4a16-hqq", {}, "its zero-points are real numbers"),
    ("gptq", "w8a8", {}, r"it rounds activations \(a8\); --to pack-quantized"),
    ("compressed-tensors", recipe(4, scale_dtype="float32"), {"dtype": torch.bfloat16}, "would be rounded to bfloat16"),
    ("gptq", {"steps": [{"method": "rtn", "scheme": {"group_size": 32, "symmetric": True}, "overrides": [
        {"match": "*.down_proj", "scheme": {"bits": 8}}]}]}, {}, "down_proj: gptq has one setting for all layers"),
    ("gptq", {"steps": [{"method": "rtn", "scheme": {"group_size": 32, "symmetric": True}, "overrides": [
        {"match": "*.down_proj", "skip": True}]}]}, {}, "model.layers.0.mlp.down_proj: .* this one is dense"),
    ("pack-quantized", "w4a16-rtn", {"embeddings": True}, "embed_tokens: .* Embedding is no linear layer"),
    ("q5_k", recipe(), {}, "unknown export format 'q5_k'"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "chosen", "config", "reason"), REFUSALS, ids=str)
def test_a_refusal_names_layer_reason_and_alternative_and_writes_nothing(tmp_path, folds, to, chosen, config, reason):
    config = dict(config)
    if config.pop("embeddings", False):
        chosen = {"steps": [{"method": "rtn", "scheme": {"bits": 8, "group_size": 32}, "targets": ["embeddings"]}]}
    with pytest.raises(InputError, match=reason):
        trifold.export(folds(chosen, **config), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_or_written(tmp_path, folds, tiny):
    with pytest.raises(
        CheckpointError, match="none, the model is dense; known: trifold, compressed-tensors, gptq, awq"
    ):
        trifold.export(tiny(), "dense", tmp_path / "out")
    with pytest.raises(InputError, match="experts of llama4_text are not exported yet"):
        trifold.export(folds("w8a16", "llama4_text"), "dense", tmp_path / "out")
    attention = {"steps": [{"method": "rtn", "scheme": {"group_size": 32}, "targets": ["*.q_proj"]}]}
    with pytest.raises(InputError, match="experts that stay dense are not exported yet"):
        trifold.export(folds(attention, "mixtral"), "dense", tmp_path / "out")
    with pytest.raises(InputError, match="only --to dense changes it"):
        trifold.export(folds(recipe()), "awq", tmp_path / "out", dtype="float16")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InputError, match=r"out\.partial: exists"):
        trifold.export(folds(recipe()), "awq", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(InputError, match="already exists and is not empty"):
        trifold.export(folds(recipe()), "awq", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: q.pop("modules"), "damaged entry in `modules`"),
        (lambda q: q["modules"][LAYER].pop("bits"), "damaged entry in `modules`"),
        (lambda q: q["modules"][LAYER].update(bits=3), f"{LAYER}.weight is not as its entry says"),
        (lambda q: q["modules"][LAYER].update(format="float"), f"{LAYER} is stored as 'float'"),
        (lambda q: q.update(format_version="2.0"), "checkpoint format 2.0 is newer"),
        (lambda q: q.update(quant_method="hqq"), "quantisation: hqq; known: trifold"),
    ],
)
def test_a_damaged_checkpoint_of_ours_is_not_exported(tmp_path, folds, change, reason):
    copy = shutil.copytree(folds(recipe()), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=reason):
        trifold.export(copy, "awq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_breaks_off_leaves_nothing(tmp_path, folds, monkeypatch):
    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "copy_companions", fail)
    with pytest.raises(KeyboardInterrupt):
        trifold.export(folds(recipe()), "awq", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_shape"), f"{LAYER}: its pack-quantized tensors .*'weight_shape' is missing"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"{LAYER}: its pack-quantized tensors .*'weight_scale' is missing"),
        (lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:, 1:].contiguous()}), "7 words"),
        (lambda t: t.update({f"{LAYER}.weight_shape": torch.tensor([96, 32])}), "8 words cannot hold 32 codes"),
        (lambda t: t.update({f"{LAYER}.odd": torch.ones(3)}), f"unexpected .*{LAYER}.odd"),
        (lambda t: t.pop("model.norm.weight"), "missing .*model.norm.weight"),
    ],
)
def test_a_damaged_import_is_refused(tmp_path, folds, change, reason):
    trifold.export(folds(recipe()), "pack-quantized", tmp_path / "ct")
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "ct" / "model.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        trifold.load(tmp_path / "ct")
