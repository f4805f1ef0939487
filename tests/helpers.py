"""Tiny models of several families, with random norm weights so that a wrong fold shows."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import trifold
from trifold.cli import main

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(126))]

COMMON = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA_LIKE = {
    "hidden_size": 48,
    "intermediate_size": 86,  # groups of 32 do not divide it
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 12},
    "olmo2": LLAMA_LIKE,
    "gemma": {**LLAMA_LIKE, "head_dim": 12},
    "opt": {**LLAMA_LIKE, "ffn_dim": 86, "word_embed_proj_dim": 48},
    "gpt2": {"n_embd": 48, "n_inner": 86, "n_layer": 3, "n_head": 4, "n_positions": 128},
}

_MIXTURE = {
    **LLAMA_LIKE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = {
    **_MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
MIXTURES = {
    "mixtral": _MIXTURE,
    "qwen2_moe": {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_MIXTURE, "num_experts": 6, "moe_intermediate_size": 32, "head_dim": 12},
    "olmoe": {**_MIXTURE, "num_experts": 4},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {
        **_MIXTURE,
        "head_dim": 12,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        **_MIXTURE,
        "num_experts_per_tok": 1,
        "head_dim": 12,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
        "attn_temperature_tuning": False,
        "no_rope_layers": [1, 1],
    },
}


def make_model(family="llama", dtype=torch.float32, seed=0, **changes):
    """A random causal language model in eval mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**COMMON, **(FAMILIES | MIXTURES)[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):  # norms
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4)  # far from uniform predictions
    return model


def make_tokenizer():
    """One token per word; `<s>` begins a document."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def save_model(folder: Path, family="llama", dtype=torch.float32, shard="5GB", **changes) -> Path:
    make_model(family, dtype, **changes).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


def compressed_once(tmp_path_factory, save):
    """make(recipe or preset, family, dtype, **config) -> a compressed folder, beside `dense`, which save(folder,
    family, dtype, **config) writes; made once."""
    made = {}

    def make(chosen, family="llama", dtype=torch.float32, **config):
        key = json.dumps([chosen, family, str(dtype), config], sort_keys=True)
        if key not in made:
            root = tmp_path_factory.mktemp("fold")
            save(root / "dense", family, dtype, **config)
            trifold.compress(root / "dense", chosen, None, root / "out", verbosity=-1)
            made[key] = root / "out"
        return made[key]

    return make


def write_text(path: Path, lines=40, words=50, seed=3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as out:
        for _ in range(lines):
            ids = torch.randint(2, len(WORDS), (words,), generator=generator).tolist()
            out.write(json.dumps({"text": " ".join(WORDS[i] for i in ids)}) + "\n")
    return path


def trifold_cli(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        main([str(argument) for argument in arguments])
    return stopped.value.code, out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
