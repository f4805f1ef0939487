"""Which dimensions inside a block can be made smaller, as data: heads of the attention, width of the MLP.

Names are relative to the block. A family is listed if its attention is no more than queries, keys and values, a
rotation of them, and softmax; whether that holds of a model is checked on its own blocks before they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Part = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Attention:
    """module: the attention; q, k, v, o: its projections, relative to it; one name for all three if they are rows of
    one linear, in this order. rotary: whether queries and keys are rotated in pairs (i, i + head_dim / 2). norms:
    normalisations of each query and key head, before the rotation. grouped: whether query heads may share a key head.
    heads, kv_heads, head_dim: of the config."""

    module: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    rotary: bool = True
    norms: tuple[str, ...] = ()
    grouped: bool = True
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    @property
    def fused(self) -> bool:
        return self.q == self.v

    @property
    def groups(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.kv_heads

    def name(self, part: Literal["q", "k", "v", "o"]) -> str:
        """A projection by its name in the block."""
        return f"{self.module}.{getattr(self, part)}"

    def rows(self, qk_dim: int, v_dim: int) -> dict[Part, slice]:
        """Where the projections lie among the outputs of their linears, with heads of these sizes."""
        sizes: dict[Part, int] = {"q": self.heads * qk_dim, "k": self.kv_heads * qk_dim, "v": self.kv_heads * v_dim}
        found: dict[Part, slice] = {}
        start = 0
        for part, size in sizes.items():
            found[part] = slice(start, start + size)
            start += size if self.fused else 0
        return found


@dataclass(frozen=True)
class FeedForward:
    """up, down: linears of the MLP. gate: the one that multiplies it after an activation; the same name as up if
    both are rows of one linear, the gate first. None without a gate."""

    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"

    @property
    def inward(self) -> tuple[str, ...]:
        """The linears whose outputs are the features of the MLP."""
        return (self.up,) if self.gate in (None, self.up) else (str(self.gate), self.up)


@dataclass(frozen=True)
class Dimensions:
    """What a block can lose. None: nothing is known of it."""

    attention: Attention | None = None
    feed_forward: FeedForward | None = None


_MLP = FeedForward()
_LLAMA = Dimensions(Attention(), _MLP)
_NORMED = Dimensions(Attention(norms=("q_norm", "k_norm")), _MLP)
_NO_GATE = FeedForward(gate=None)
_FUSED_MLP = FeedForward("mlp.gate_up_proj", gate="mlp.gate_up_proj")
_GPT_MLP = FeedForward("mlp.c_fc", "mlp.c_proj", None)
_OPT = Attention(o="out_proj", rotary=False, grouped=False)
_GPT2 = Attention("attn", "c_attn", "c_attn", "c_attn", "c_proj", rotary=False, grouped=False)
_OPT_MLP = FeedForward("fc1", "fc2", None)
_NEOX_MLP = FeedForward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", None)
_ONLY_MLP = Dimensions(None, _MLP)

DIMENSIONS: dict[str, Dimensions] = {
    "arcee": Dimensions(Attention(), _NO_GATE),
    "biogpt": Dimensions(_OPT, _OPT_MLP),
    "bloom": Dimensions(None, _NEOX_MLP),
    "cohere": _ONLY_MLP,
    "cohere2": _ONLY_MLP,
    "cwm": _LLAMA,
    "ernie4_5": _ONLY_MLP,
    "exaone4": _ONLY_MLP,
    "falcon": Dimensions(None, _NEOX_MLP),
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _NORMED,
    "glm": Dimensions(None, _FUSED_MLP),
    "glm4": Dimensions(None, _FUSED_MLP),
    "gpt2": Dimensions(_GPT2, _GPT_MLP),
    "gpt_neo": Dimensions(None, _GPT_MLP),
    "gpt_neox": Dimensions(None, _NEOX_MLP),
    "gptj": Dimensions(None, FeedForward("mlp.fc_in", "mlp.fc_out", None)),
    "granite": _LLAMA,
    "helium": _ONLY_MLP,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _ONLY_MLP,
    "olmo2": _ONLY_MLP,
    "olmo3": _ONLY_MLP,
    "opt": Dimensions(_OPT, _OPT_MLP),
    "phi": Dimensions(None, FeedForward("mlp.fc1", "mlp.fc2", None)),
    "phi3": Dimensions(Attention(q="qkv_proj", k="qkv_proj", v="qkv_proj"), _FUSED_MLP),
    "qwen2": _LLAMA,
    "qwen3": _NORMED,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _ONLY_MLP,
    "starcoder2": Dimensions(Attention(), _GPT_MLP),
    "vaultgemma": _LLAMA,
}
"""By `model_type` of the text config. Attention is absent where queries and keys are rotated or laid out otherwise."""


def dimensions_of(config: Any) -> Dimensions:
    """What is known of a model's family, with the sizes of its heads. config: a text model's, with `model_type`."""
    known = DIMENSIONS.get(config.model_type, Dimensions())
    if known.attention is None:
        return known
    heads = config.num_attention_heads
    kv_heads = (known.attention.grouped and getattr(config, "num_key_value_heads", None)) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return replace(known, attention=replace(known.attention, heads=heads, kv_heads=kv_heads, head_dim=head_dim))
