"""What a plan promises without weights: published parameter counts, and the very sizes of what is written."""

import json

import pytest

import trifold
from tests.helpers import trifold_cli
from trifold.compress.estimate import estimate_model
from trifold.compress.recipe import Recipe
from trifold.compress.summary import summarise

LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
CONFIGS = {
    8_030_261_248: LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    70_553_706_496: LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    46_702_792_704: {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    30_532_122_624: {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    671_026_419_200: {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("parameters", CONFIGS)
def test_parameters_of_models_that_are_known(parameters, tmp_path):
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(CONFIGS[parameters] | {"torch_dtype": "bfloat16"}))
    found = estimate_model(path, Recipe.load("w4a16-gptq"))
    assert found.parameters == parameters and found.dense_bytes == 2 * parameters
    assert sum(part.bytes for part in found.components.values()) == found.total_bytes
    assert sum(part.dense_bytes for part in found.components.values()) == found.dense_bytes
    assert found.bits_per_weight == 4.15625 and 4.15625 < found.model_bits_per_weight < 6


def test_memory_and_disk_of_lower_rank(tmp_path):
    path, width = tmp_path / "bare.json", 14336
    shape = {"hidden_size": 4096, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 32}
    path.write_text(json.dumps(LLAMA | shape | {"torch_dtype": "bfloat16"}))
    found = {name: estimate_model(path, Recipe.load(name)) for name in ("rank80", "rank80-svdllm", "rank80-modegpt")}
    gram = 8 * width**2
    assert 2 * gram < found["rank80-svdllm"].memory["solve"] + gram < found["rank80"].memory["solve"]  # and its drift
    assert found["rank80"].memory["allocate"] > gram + 4 * found["rank80"].components["mlp"].parameters / 2
    assert 5 * gram < found["rank80-modegpt"].memory["rewrite"] < 10 * gram
    for name, entry in found.items():
        assert entry.disk["output"] == pytest.approx(entry.total_bytes, rel=0.001), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3"])
@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w3a16-hqq", "w8a16-channel", "w8a8-fp8", "w4a16-nf4", "everything"])
def test_sizes_are_those_of_what_is_written(tiny, tmp_path, family, recipe):
    model = tiny(family)
    everything = {"steps": [{"method": "rtn", "targets": ["blocks", "embeddings", "head"]}]}
    chosen = Recipe.load(everything if recipe == "everything" else recipe)
    trifold.compress(model, chosen, None, tmp_path / "out", verbosity=-1)
    found, written = estimate_model(model, chosen, "float32"), summarise(tmp_path / "out")
    assert found.layers == len(written["layers"])
    for name in ("bits_per_weight", "model_bits_per_weight", "total_bytes", "dense_bytes"):
        assert getattr(found, name) == written[name], name


def test_the_command(tiny, tmp_path):
    code, stdout, stderr = trifold_cli("plan", tiny(), "-r", "w4a16-gptq", "--json", "-", "--set", "bits=3")
    found = json.loads(stdout)
    assert (code, stderr) == (0, "") and found["blocks"] == 3 and found["components"]["self_attn"]["bytes"] > 0
    code, stdout, _ = trifold_cli("plan", tiny() / "config.json", "-r", "w4a16-gptq")
    assert code == 0 and "self_attn" in stdout and f"{found['parameters']:,}" in stdout
    code, _, stderr = trifold_cli("plan", tmp_path, "-r", "w4a16-gptq")
    assert code == 2 and "no config.json" in stderr
    code, _, stderr = trifold_cli("plan", tiny(), "-r", "s50-wanda", "--set", "global_sparsity=0.4")
    assert code == 0 and "wanda: its budget is divided when it runs; sizes are as if evenly" in stderr
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    code, _, stderr = trifold_cli("plan", tmp_path / "config.json", "-r", "w4a16-gptq")
    assert code == 2 and "not a causal language model" in stderr
