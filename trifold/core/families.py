"""What is known of the architectures of transformers, as literals of `Fold`; aliases are dictionary entries.

A fold is listed only if it keeps the function exactly: the norm's other readers (a router, a convolution, the
residual) rule it out, and so does a normalisation, a clamp or an activation between producer and consumer. The
exceptions are gates, which multiply, and ReLU, which is positively homogeneous.
"""

from __future__ import annotations

import contextlib
from typing import Any

from trifold.core.dimensions import dimensions_of
from trifold.core.topology import Fold, Rows, Topology

When = tuple[tuple[str, Any], ...]
_QKV = ("q_proj", "k_proj", "v_proj")
_RELU: When = (("activation_function", "relu"),)


def _norm(producer: str, module: str, *names: str, offset: float = 0.0, when: When = ()) -> Fold:
    """A norm before linears of one module; before those of the whole block if it is ""."""
    consumers = tuple(f"{module}.{name}" if module else name for name in names)
    return Fold("norm", producer, consumers, module, offset, when=when)


def _value(producer: str, consumer: str, rows: Rows = "all", when: When = ()) -> Fold:
    return Fold("value", producer, (consumer,), consumer, rows=rows, when=when)


def _linear(producer: str, consumer: str, rows: Rows = "all", when: When = ()) -> Fold:
    return Fold("linear", producer, (consumer,), consumer, rows=rows, when=when)


def _gated(module: str = "mlp", fused: bool = False) -> Fold:
    """down(act(gate) * up): linear in up."""
    if fused:
        return _linear(f"{module}.gate_up_proj", f"{module}.down_proj", "second half")
    return _linear(f"{module}.up_proj", f"{module}.down_proj")


_VALUE = _value("self_attn.v_proj", "self_attn.o_proj")
_ATTENTION = (_norm("input_layernorm", "self_attn", *_QKV), _VALUE)
_GATE_UP = _norm("post_attention_layernorm", "mlp", "gate_proj", "up_proj")

_LLAMA = (*_ATTENTION, _GATE_UP, _gated())
_POST_NORM = (_VALUE, _gated())  # norms behind attention and MLP: nothing to fold into
_NO_GATE = (*_ATTENTION, _norm("post_attention_layernorm", "mlp", "up_proj"))

_HYBRID = (*_ATTENTION, _norm("input_layernorm", "mamba", "in_proj"))
_FEED_FORWARD = (_norm("pre_ff_layernorm", "feed_forward", "gate_proj", "up_proj"), _gated("feed_forward"))
_MAMBA_NORM = _norm("mamba.norm", "mamba", "out_proj")
_LLAMA4 = (
    *_ATTENTION,
    _norm("post_attention_layernorm", "feed_forward", "gate_proj", "up_proj"),
    _gated("feed_forward"),
    _gated("feed_forward.shared_expert"),
)
_LATENT = (
    _norm("input_layernorm", "self_attn", "q_proj", "kv_a_proj_with_mqa"),
    _norm("input_layernorm", "self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
    _norm("self_attn.q_a_layernorm", "self_attn", "q_b_proj"),
    _norm("self_attn.kv_a_layernorm", "self_attn", "kv_b_proj"),
    _value("self_attn.kv_b_proj", "self_attn.o_proj", "latent"),
    _GATE_UP,
    _gated(),
    _gated("mlp.shared_experts"),
)

_GEMMA = (  # norms multiply by 1 + weight
    _norm("input_layernorm", "self_attn", *_QKV, offset=1.0),
    _VALUE,
    _norm("post_attention_layernorm", "mlp", "gate_proj", "up_proj", offset=1.0),
    _gated(),
)
_GEMMA2 = (
    *_GEMMA[:2],
    _norm("pre_feedforward_layernorm", "mlp", "gate_proj", "up_proj", offset=1.0),
    _gated(),
)
_GEMMA3N = (  # values are normalised; the first norm also feeds a residual
    _norm("pre_feedforward_layernorm", "mlp", "gate_proj", "up_proj"),
    _gated(),
)
_GEMMA4 = (_ATTENTION[0], *_GEMMA3N)
_RECURRENT_GEMMA = (
    _norm("temporal_pre_norm", "temporal_block", *_QKV, offset=1.0),
    _norm("temporal_pre_norm", "temporal_block", "linear_y", "linear_x", offset=1.0),
    _value("temporal_block.v_proj", "temporal_block.o_proj"),
    _norm("channel_pre_norm", "mlp_block", "gate_proj", "up_proj", offset=1.0),
    _gated("mlp_block"),
)
_QWEN3_5 = (
    *_GEMMA,
    _norm("input_layernorm", "linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", offset=1.0),
)
_QWEN3_NEXT = (
    *_GEMMA[:2],
    _norm("input_layernorm", "linear_attn", "in_proj_qkvz", "in_proj_ba", offset=1.0),
    _gated("mlp.shared_expert"),
)

_PHI3 = (
    _norm("input_layernorm", "self_attn", "qkv_proj"),
    _value("self_attn.qkv_proj", "self_attn.o_proj", "last"),
    _norm("post_attention_layernorm", "mlp", "gate_up_proj"),
    _gated(fused=True),
)
_GLM = (*_ATTENTION, *_PHI3[2:])
_COHERE = (  # one norm for attention and MLP beside each other
    _norm("input_layernorm", "", *(f"self_attn.{name}" for name in _QKV), "mlp.gate_proj", "mlp.up_proj"),
    *_POST_NORM,
)
_PARALLEL: When = (("use_parallel_residual", True),)
_STABLELM = (
    Fold(**{**vars(_COHERE[0]), "when": _PARALLEL}),
    Fold(**{**vars(_ATTENTION[0]), "when": (("use_parallel_residual", False),)}),
    _VALUE,
    _GATE_UP,
    _gated(),
)
_PHI = (
    _norm("input_layernorm", "", *(f"self_attn.{name}" for name in _QKV), "mlp.fc1"),
    _value("self_attn.v_proj", "self_attn.dense"),
)
_STARCODER2 = (*_ATTENTION, _norm("post_attention_layernorm", "mlp", "c_fc"))
_APERTUS = (
    _norm("attention_layernorm", "self_attn", *_QKV),
    _VALUE,
    _norm("feedforward_layernorm", "mlp", "up_proj"),
)
_BITNET = (
    _ATTENTION[0],
    _norm("self_attn.attn_sub_norm", "self_attn", "o_proj"),
    _GATE_UP,
    _norm("mlp.ffn_sub_norm", "mlp", "down_proj"),
)
_NEMOTRON = (
    _GEMMA[0],
    _VALUE,
    _norm("post_attention_layernorm", "mlp", "up_proj", offset=1.0),
)
_OLMO = (  # norms without a weight; clamped values cannot be scaled
    Fold(**{**vars(_VALUE), "when": (("clip_qkv", None),)}),
    _gated(),
)
_OLMOE = (_ATTENTION[0], _OLMO[0])
_LFM2 = (
    _norm("operator_norm", "self_attn", *_QKV),
    _value("self_attn.v_proj", "self_attn.out_proj"),
    _norm("operator_norm", "conv", "in_proj"),
    _norm("ffn_norm", "feed_forward", "w1", "w3"),
    _linear("feed_forward.w3", "feed_forward.w2"),
)
_MAMBA = (_norm("norm", "mixer", "in_proj"),)

_GPT2 = (
    _norm("ln_1", "attn", "c_attn"),
    _value("attn.c_attn", "attn.c_proj", "last"),
    _norm("ln_2", "mlp", "c_fc"),
)
_BIGCODE = (
    _GPT2[0],
    _value("attn.c_attn", "attn.c_proj", "last", when=(("multi_query", True),)),
    _value("attn.c_attn", "attn.c_proj", "grouped", when=(("multi_query", False),)),
    _GPT2[2],
)
_GPT_NEO = (
    _norm("ln_1", "attn", *(f"attention.{name}" for name in _QKV)),
    _value("attn.attention.v_proj", "attn.attention.out_proj"),
    _GPT2[2],
)
_GPTJ = (
    _norm("ln_1", "", *(f"attn.{name}" for name in _QKV), "mlp.fc_in"),
    _value("attn.v_proj", "attn.out_proj"),
)
_CODEGEN = (_norm("ln_1", "", "attn.qkv_proj", "mlp.fc_in"),)
_GPT_NEOX = (
    _norm("input_layernorm", "attention", "query_key_value"),
    _value("attention.query_key_value", "attention.dense", "grouped"),
    _norm("post_attention_layernorm", "mlp", "dense_h_to_4h"),
)
_PERSIMMON = (
    _norm("input_layernorm", "self_attn", "query_key_value"),
    _value("self_attn.query_key_value", "self_attn.dense", "grouped"),
    _GPT_NEOX[2],
)
_PRE_NORM: When = (("apply_residual_connection_post_layernorm", False),)  # else the residual reads the norm too
_BLOOM = (
    _norm("input_layernorm", "self_attention", "query_key_value", when=_PRE_NORM),
    _value("self_attention.query_key_value", "self_attention.dense", "grouped"),
    _norm("post_attention_layernorm", "mlp", "dense_h_to_4h", when=_PRE_NORM),
)
_BESIDE, _BEHIND = ("parallel_attn", True), ("parallel_attn", False)
_NEW, _OLD = ("new_decoder_architecture", True), ("new_decoder_architecture", False)
_FALCON = (
    _norm("ln_attn", "self_attention", "query_key_value"),
    _norm("ln_mlp", "mlp", "dense_h_to_4h"),
    _norm("input_layernorm", "", "self_attention.query_key_value", "mlp.dense_h_to_4h", when=(_BESIDE,)),
    _norm("input_layernorm", "self_attention", "query_key_value", when=(_BEHIND,)),
    _norm("post_attention_layernorm", "mlp", "dense_h_to_4h", when=(_BEHIND,)),
    _value("self_attention.query_key_value", "self_attention.dense", "grouped", (_NEW,)),
    _value("self_attention.query_key_value", "self_attention.dense", "grouped", (_OLD, ("multi_query", False))),
    _value("self_attention.query_key_value", "self_attention.dense", "last", (_OLD, ("multi_query", True))),
)
_MPT = (
    _norm("norm_1", "attn", "Wqkv"),
    _value("attn.Wqkv", "attn.out_proj", "last", when=(("attn_config.clip_qkv", None),)),
    _norm("norm_2", "ffn", "up_proj"),
)
_BART_VALUE = _value("self_attn.v_proj", "self_attn.out_proj")
_OPT = (
    _norm("self_attn_layer_norm", "self_attn", *_QKV, when=(("do_layer_norm_before", True),)),
    _BART_VALUE,
    _norm("final_layer_norm", "", "fc1", when=(("do_layer_norm_before", True),)),
    _linear("fc1", "fc2", when=_RELU),
)
_XGLM = (
    _norm("self_attn_layer_norm", "self_attn", *_QKV),
    _BART_VALUE,
    _norm("final_layer_norm", "", "fc1"),
    _linear("fc1", "fc2", when=_RELU),
)

FOLDS: dict[str, tuple[Fold, ...]] = {
    "apertus": _APERTUS,
    "arcee": _NO_GATE,
    "bamba": (*_HYBRID, _MAMBA_NORM, *_FEED_FORWARD),
    "biogpt": _XGLM[:3],
    "bitnet": _BITNET,
    "bloom": _BLOOM,
    "codegen": _CODEGEN,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "cwm": _LLAMA,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "diffllama": (_ATTENTION[0], _GATE_UP, _gated()),
    "ernie4_5": _LLAMA,
    "exaone4": _POST_NORM,
    "falcon": _FALCON,
    "falcon_h1": (_VALUE, *_FEED_FORWARD),
    "falcon_mamba": _MAMBA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4,
    "glm": _GLM,
    "glm4": _GLM,
    "glm4_moe": (*_LLAMA, _gated("mlp.shared_experts")),
    "gpt2": _GPT2,
    "gpt_bigcode": _BIGCODE,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "gpt_neox_japanese": _GPT_NEOX,
    "gpt_oss": _ATTENTION,
    "gptj": _GPTJ,
    "granite": _LLAMA,
    "granitemoe": _ATTENTION,
    "granitemoehybrid": (*_HYBRID, _MAMBA_NORM),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "internlm3": _LLAMA,
    "jamba": (*_HYBRID, *_FEED_FORWARD),
    "lfm2": _LFM2,
    "llama": _LLAMA,
    "llama4_text": _LLAMA4,
    "mamba": _MAMBA,
    "mamba2": (*_MAMBA, _norm("mixer.norm", "mixer", "out_proj")),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _ATTENTION,
    "mllama_text_model": _LLAMA,
    "mpt": _MPT,
    "nanochat": (_VALUE,),
    "nemotron": _NEMOTRON,
    "olmo": _OLMO,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _OLMOE,
    "openai-gpt": _GPT2[1:2],
    "opt": _OPT,
    "persimmon": _PERSIMMON,
    "phi": _PHI,
    "phi3": _PHI3,
    "phimoe": _ATTENTION,
    "qwen2": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen2_moe": (*_LLAMA, _gated("mlp.shared_expert")),
    "qwen2_vl_text": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_moe": _LLAMA,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_vl_text": _LLAMA,
    "recurrent_gemma": _RECURRENT_GEMMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _STABLELM,
    "starcoder2": _STARCODER2,
    "vaultgemma": _GEMMA2,
    "xglm": _XGLM,
}
"""By `model_type` of the (text) config. A family that is absent is served by inspection alone."""


def topology_of(config: Any) -> Topology:
    """The literal of a family, less what this model lacks; an empty one for a family that is only inspected.

    config: a text model's, with `model_type`.
    """
    folds = tuple(fold for fold in FOLDS.get(config.model_type, ()) if fold.holds(config))
    return Topology(folds, _head_dim(config), dimensions_of(config))


def _head_dim(config: Any) -> int:
    """Features of one value head, 0 if they cannot be told (some configs refuse what differs between layers)."""
    with contextlib.suppress(Exception):
        known = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
        return known or config.hidden_size // config.num_attention_heads
    return 0
