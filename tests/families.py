"""Tiny configurations of the architectures of transformers: two blocks or so, a few thousand parameters each.

Where a family's blocks differ (attention types, dense and expert layers), both kinds are present.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.helpers import COMMON
from trifold.kernels import PackedLinear

SMALL = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD = {**SMALL, "head_dim": 12}  # 4 heads of 12 are wider than the hidden states
WINDOW = {"sliding_window": 5}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {**COMMON, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
STATE = {
    "hidden_size": 32,
    "state_size": 8,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "time_step_rank": 4,
    **COMMON,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}

FAMILIES = {
    "apertus": SMALL,
    "arcee": SMALL | {"head_dim": 8},
    "bamba": SMALL | MAMBA | {"attn_layer_indices": [1]},
    "biogpt": SMALL,
    "bitnet": SMALL,
    "bloom": COMMON | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": SMALL,
    "cohere2": HEAD | MIXED,
    "cwm": HEAD | MIXED,
    "deepseek_v2": SMALL
    | {"num_key_value_heads": 4}
    | LATENT
    | ROUTED
    | {"n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "deepseek_v3": SMALL
    | {"num_key_value_heads": 4}
    | LATENT
    | ROUTED
    | {"n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "diffllama": SMALL | {"head_dim": 8},
    "ernie4_5": HEAD,
    "exaone4": SMALL | MIXED,
    "falcon": COMMON
    | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    | {"new_decoder_architecture": True},
    "falcon_h1": HEAD | MAMBA | {"mamba_d_ssm": 64},
    "falcon_mamba": STATE,
    "gemma": HEAD,
    "gemma2": HEAD | MIXED,
    "gemma3_text": HEAD | MIXED,
    "gemma3n_text": HEAD
    | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    | {"vocab_size_per_layer_input": 128, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5},
    "gemma4_text": HEAD
    | MIXED
    | {"global_head_dim": 16, "hidden_size_per_layer_input": 8}
    | {"vocab_size_per_layer_input": 128},
    "glm": SMALL | {"head_dim": 8},
    "glm4": SMALL | {"head_dim": 8},
    "glm4_moe": SMALL | ROUTED | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": COMMON
    | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 5}
    | {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SMALL,
    "gpt_neox_japanese": SMALL | {"intermediate_multiple_size": 2},
    "gpt_oss": SMALL | LOCAL | {"head_dim": 8},
    "gptj": GPT | {"rotary_dim": 4},
    "granite": SMALL
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    "granitemoe": SMALL | LOCAL | {"residual_multiplier": 0.4, "attention_multiplier": 0.2},
    "granitemoehybrid": SMALL
    | LOCAL
    | MAMBA
    | {"shared_intermediate_size": 40, "layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    "helium": SMALL | {"head_dim": 8},
    "hunyuan_v1_dense": HEAD,
    "internlm3": SMALL | {"head_dim": 8},
    "jamba": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_dt_rank": 4, "mamba_d_state": 8}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": SMALL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": SMALL | {"head_dim": 12},
    "llama4_text": SMALL
    | LOCAL
    | {"head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": 8, "interleave_moe_layer_step": 2},
    "mamba": STATE,
    "mamba2": COMMON
    | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": HEAD | MIXED,
    "ministral3": HEAD,
    "mistral": HEAD | WINDOW,
    "mixtral": SMALL | LOCAL,
    "mpt": COMMON | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "nanochat": SMALL,
    "nemotron": SMALL | {"head_dim": 8},
    "olmo": SMALL,
    "olmo2": SMALL,
    "olmo3": SMALL | MIXED,
    "olmoe": SMALL | FEW,
    "openai-gpt": COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "persimmon": SMALL,
    "phi": SMALL,
    "phi3": SMALL,
    "phimoe": SMALL | LOCAL,
    "qwen2": SMALL,
    "qwen2_moe": SMALL
    | FEW
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3": HEAD,
    "qwen3_5_text": HEAD | DELTA,
    "qwen3_moe": HEAD | LOCAL | {"moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_next": HEAD | DELTA | FEW | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "recurrent_gemma": SMALL | {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "rwkv": COMMON
    | {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"rescale_every": 0},
    "seed_oss": HEAD,
    "smollm3": SMALL | {"no_rope_layers": [1, 0]},
    "stablelm": SMALL,
    "starcoder2": SMALL,
    "vaultgemma": HEAD | MIXED,
    "xglm": COMMON
    | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
}

TEXT = {**SMALL, "max_position_embeddings": 128}
SIGHT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
PIXELS = {**SIGHT, "image_size": 16, "patch_size": 4}
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
MERGED = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
IMAGE = 120  # the token that stands for a part of an image
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}

VISION = {
    "gemma3": {
        "text_config": TEXT | {"head_dim": 8} | MIXED,
        "vision_config": PIXELS,
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": PIXELS,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": SIGHT | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": PIXELS | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 8},
        "vision_config": PIXELS | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
    },
    "mllama": {
        "text_config": TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "attention_heads": 4}
        | {"num_global_layers": 1, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0]}
        | {"vision_output_dim": 64, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
        "image_token_index": IMAGE,
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
        "vision_config": PIXELS | {"model_type": "siglip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "qwen2_vl": {
        "text_config": MROPE,
        "vision_config": MERGED | {"embed_dim": 64, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": MROPE,
        "vision_config": MERGED
        | {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 32}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": MROPE | {"head_dim": 8},
        "vision_config": MERGED
        | {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 32}
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": PIXELS,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
}
"""Models that also see."""

VARIANTS = {
    "bloom-residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "deepseek_v2-full-queries": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3-full-queries": ("deepseek_v3", {"q_lora_rank": None}),
    "falcon-one-norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "falcon-multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": True}),
    "falcon-multi-head": ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
    "falcon-sequential": ("falcon", {"new_decoder_architecture": False, "parallel_attn": False}),
    "gemma4_text-keys-as-values": ("gemma4_text", {"attention_k_eq_v": True}),
    "gpt_bigcode-multi-head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_oss-wide-heads": ("gpt_oss", {"head_dim": 12}),
    "olmo-clamped": ("olmo", {"clip_qkv": 0.05}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt-gelu": ("opt", {"activation_function": "gelu"}),
    "phi-layernorm": ("phi", {"qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "xglm-relu": ("xglm", {"activation_function": "relu"}),
}
"""Settings of a family that change which folds it has."""


def config_of(name):
    """The tiny configuration of a family or variant; skips if this transformers has no such family."""
    family, changes = VARIANTS.get(name, (name, {}))
    if family not in CONFIG_MAPPING:
        pytest.skip(f"{family}: not in transformers {transformers.__version__}")
    return CONFIG_MAPPING[family](**({**FAMILIES, **VISION}[family] | changes))


def make_family(name, dtype=torch.float32, seed=0):
    """A random language model in eval mode; norms and biases are random multiples of 1/64."""
    torch.manual_seed(seed)
    auto = AutoModelForMultimodalLM if name in VISION else AutoModelForCausalLM
    model = auto.from_config(config_of(name), dtype=dtype).eval()
    if dtype == torch.float64:  # the fused product of experts knows no doubles
        model.set_experts_implementation("eager")
    randomise(model, seed + 1)
    return model


def randomise(model, seed):
    """Norms and biases far from their initial values, and predictions far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randint(-16, 17, parameter.shape, generator=generator) / 64
                parameter.copy_((parameter * 64).round() / 64 + noise)
            elif parameter.dim() == 2 and parameter.any():
                parameter.mul_(4)
            elif parameter.dim() == 2:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def with_image(name, seed):
    """Inputs of a model that sees: a random image of 16 x 16 between words."""
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    parts = {"gemma3": 4, "idefics3": 4, "internvl": 4, "mistral3": 4, "mllama": 1, "smolvlm": 4}.get(name, 16)
    inputs = {"pixel_values": pixels}
    if name.startswith("qwen"):
        parts = 4
        inputs = {"pixel_values": pixels.tile(2).reshape(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    elif name in ("idefics3", "smolvlm"):
        inputs = {"pixel_values": pixels[None]}
    elif name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    elif name == "mllama":
        one = torch.ones(1, 1, dtype=torch.int64)
        inputs = {"pixel_values": pixels[None, None], "aspect_ratio_ids": one, "aspect_ratio_mask": one[None]}
        inputs["cross_attention_mask"] = torch.ones(1, 8 + parts - 1, 1, 1)
    ids = torch.tensor([[3, 4, 122, *[IMAGE] * parts, 123, 5, 6, 7]])
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, **inputs}


def rounded(x):
    """Every token to 8 bits by its largest magnitude."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round() * scale


def unpacked(model):
    """The same model on plain linears, with the weights that the packed ones stand for; it is changed itself."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            weight = module.dequantize()
            linear = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
            linear.weight.data = weight
            if module.bias is not None:
                linear.bias.data = module.bias.data
            if module.spec.get("input"):
                linear.register_forward_pre_hook(lambda _, args: rounded(args[0]))
            model.set_submodule(name, linear)
    return model
