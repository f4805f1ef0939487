"""Tiny models of several families, with random norm weights so that a wrong fold shows."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

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
    "gpt2": {"n_embd": 48, "n_inner": 86, "n_layer": 3, "n_head": 4, "n_positions": 128},
}


def make_model(family="llama", dtype=torch.float32, seed=0, **changes):
    """A random causal language model in eval mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **changes})
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
