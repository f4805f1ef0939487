"""What llama.cpp wants to know of a model, and what it calls the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trifold.core.canonical import Canonical, Dense, Quantized
from trifold.core.errors import InputError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """name: llama.cpp's. rotated: queries and keys are turned in pairs of neighbours, not of halves. biased: what may
    have a bias. head: whether a head of its own is needed. normed: whether the weights of chosen experts add up to
    one. free_heads: whether all heads together may have another size than the hidden states."""

    name: str
    rotated: bool = False
    biased: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head: bool = False
    normed: bool = True
    free_heads: bool = True


_ANY = (*Architecture.biased, "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = Architecture("llama", rotated=True, biased=_ANY)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture("qwen2", free_heads=False),
    "qwen2_moe": Architecture("qwen2moe", head=True, normed=False, free_heads=False),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
}
"""By `model_type`."""


def architecture(config: Config) -> Architecture:
    """Raises InputError for a model that llama.cpp would not run as transformers does.

    config: of transformers, with its defaults.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(f"{kind} is not exported to gguf; known: {', '.join(sorted(ARCHITECTURES))}; use --to dense")
    found = ARCHITECTURES[kind]
    why = _refusal(config, found) or _rope_refusal(config, found)
    if why is not None:
        raise InputError(f"{why}, which llama.cpp's {found.name} does not run; --to dense can hold it")
    return found


def _refusal(config: Config, kind: Architecture) -> str | None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act={config['hidden_act']!r}"
    window, limit = config.get("sliding_window"), config.get("max_position_embeddings") or math.inf
    slides = any("sliding" in str(each) for each in config.get("layer_types") or ()) or (
        config.get("model_type") in ("mistral", "mixtral") and window is not None
    )
    if slides and (window or 0) < limit:
        return f"sliding_window={window}"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "dense layers between those with experts (mlp_only_layers, decoder_sparse_step)"
    if config.get("norm_topk_prob", kind.normed) != kind.normed:
        return f"norm_topk_prob={config['norm_topk_prob']}"
    heads, size = config["num_attention_heads"], head_size(config)
    if not kind.free_heads and heads * size != config["hidden_size"]:
        return f"{heads} heads of {size} with hidden_size={config['hidden_size']}"
    return None


def _rope(config: Config) -> Mapping[str, Any]:
    return config.get("rope_parameters") or {}


def _rope_refusal(config: Config, kind: Architecture) -> str | None:
    rope = _rope(config)
    named = rope.get("rope_type", "default")
    if named not in ("default", "linear", "yarn", "llama3") or (named == "llama3" and kind.name != "llama"):
        return f"rope_type={named!r}"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        return "partial_rotary_factor"
    if named == "yarn":
        usual = 0.1 * math.log(rope["factor"]) + 1.0
        other = rope.get("attention_factor") not in (None, usual) or rope.get("mscale") or rope.get("mscale_all_dim")
        if other or not rope.get("truncate", True):
            return "yarn with attention_factor, mscale or truncate of its own"
    return None


def head_size(config: Config) -> int:
    """Features of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def write_settings(writer: Any, config: Config, kind: Architecture) -> None:
    """Everything but tensors and tokenizer. writer: a `gguf.GGUFWriter`."""
    import gguf

    heads, size, rope = config["num_attention_heads"], head_size(config), _rope(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope.get("rope_type") == "yarn":
        before = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(before))
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        for key, add in (
            ("moe_intermediate_size", writer.add_expert_feed_forward_length),
            ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ):
            if config.get(key):
                add(config[key])


def rope_factors(config: Config) -> torch.Tensor | None:
    """Llama 3's: what the wavelengths of each pair of a head are stretched by, (head size / 2,) float32."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, before = head_size(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turn = rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    wavelength = 2 * math.pi * turn
    smooth = ((before / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def tensor_name(name: str, config: Config, kind: Architecture) -> str:
    """llama.cpp's name of a tensor, of transformers' name. Raises InputError if it has none."""
    import gguf

    layers = gguf.get_tensor_name_map(_arch(kind), config["num_hidden_layers"])
    found = layers.get_name(name, (".weight", ".bias"))
    layer, _, leaf = name.rpartition(".")
    if found is None or (leaf == "bias" and layer.rpartition(".")[2] not in kind.biased):
        raise InputError(f"{name}: llama.cpp's {kind.name} has no such tensor; --to dense can hold it")
    return found


def _arch(kind: Architecture) -> Any:
    import gguf

    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name)


def always_float32(name: str) -> bool:
    """Whether llama.cpp computes with this tensor of its own in float32 only."""
    return name.endswith(("_norm.weight", ".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"))


def row_order(name: str, config: Config, kind: Architecture) -> torch.Tensor | None:
    """Which row of transformers' tensor each of llama.cpp's is; None if they are in the same order.

    transformers turns feature i of a head together with feature i + size / 2, llama.cpp's Llama neighbours.
    """
    layer = name.rpartition(".")[0]
    if not kind.rotated or not layer.endswith((".q_proj", ".k_proj")):
        return None
    heads = config["num_attention_heads"]
    if layer.endswith(".k_proj"):
        heads = config.get("num_key_value_heads") or heads
    size = head_size(config)
    return torch.arange(heads * size).reshape(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def reordered(weight: Canonical, order: torch.Tensor | None) -> Canonical:
    """The weight with its rows in another order: row i of the result is row order[i]."""
    match weight:
        case _ if order is None:
            return weight
        case Dense(values):
            return Dense(values[order])
        case Quantized(codes, scale, zero, scheme) if scheme.group_size == "tensor":
            return Quantized(codes[order], scale, zero, scheme)
        case Quantized(codes, scale, zero, scheme):
            return Quantized(codes[order], scale[order], None if zero is None else zero[order], scheme)
    raise TypeError(f"rows of a {type(weight).__name__} stay where they are")
