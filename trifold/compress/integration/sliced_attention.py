"""Attention whose heads have fewer features than the model's config says, fewer in values than in keys perhaps.

One forward for all architectures whose attention is: project, normalise heads if so, rotate, attend, project. What a
model's own module says of its scaling, window, soft cap and dropout is taken over as it is. The cache holds keys and
values of the reduced sizes; FlashAttention, which wants one size, is given zeros beside them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from trifold.core.dimensions import Attention, Part


class SlicedAttention(nn.Module):
    """own: the attention that it stands for, whose submodules it takes over. layout: how that one is built. qk_dim,
    v_dim: features of a query and key head, of a value head.

    rotary_index: (kv heads, qk_dim / 2) int16, a buffer: which of the model's frequencies turns each pair (i, i +
    qk_dim / 2) of a head; zeros until it is loaded. None without rotation, or where queries and keys are whole.
    """

    rotary_index: torch.Tensor | None
    config: Any
    layer_idx: int
    resid_dropout: nn.Module

    def __init__(self, own: nn.Module, layout: Attention, qk_dim: int, v_dim: int) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(own).items() if not name.startswith("_")}
        vars(self).update(plain)  # attention functions read `config`, `layer_idx`, `is_causal` and more of the module
        for name, child in own.named_children():
            self.add_module(name, child)
        self.layout, self.qk_dim, self.v_dim = layout, qk_dim, v_dim
        self.num_key_value_groups = layout.groups
        self.rotates = layout.rotary and bool(getattr(own, "use_rope", True))  # some blocks do without
        cut = self.rotates and qk_dim < layout.head_dim
        index = torch.zeros(layout.kv_heads, qk_dim // 2, dtype=torch.int16) if cut else None
        self.register_buffer("rotary_index", index)
        self._eager: Any = getattr(sys.modules[type(own).__module__], "eager_attention_forward", None)
        self.scaling = getattr(own, "scaling", layout.head_dim**-0.5)  # of the whole heads
        self.train(own.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (batch, tokens, hidden) -> the same shape, and the attention weights if they are kept."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shape = hidden_states.shape[:-1]
        q, k, v = self._projected(hidden_states)
        if self.layout.norms:
            q, k = (self.get_submodule(n)(heads) for n, heads in zip(self.layout.norms, (q, k), strict=True))
        if self.rotates:
            assert position_embeddings is not None
            q, k = self._turned(q, k, *position_embeddings)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._eager)
        if "flash" in (self.config._attn_implementation or "") and self.qk_dim != self.v_dim:
            q, k, v = (pad(heads, (0, max(self.qk_dim, self.v_dim) - heads.shape[-1])) for heads in (q, k, v))
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=self._dropout(), scaling=self.scaling, **self._extra(), **kwargs
        )
        out = self.get_submodule(self.layout.o)(out[..., : self.v_dim].reshape(*shape, -1).contiguous())
        return (self.resid_dropout(out) if hasattr(self, "resid_dropout") else out), weights

    def _projected(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, (batch, tokens, heads, features)."""
        layout, found = self.layout, []
        rows, outputs = layout.rows(self.qk_dim, self.v_dim), dict[str, torch.Tensor]()
        sizes: dict[Part, tuple[int, int]] = {
            "q": (layout.heads, self.qk_dim),
            "k": (layout.kv_heads, self.qk_dim),
            "v": (layout.kv_heads, self.v_dim),
        }
        for part, (heads, size) in sizes.items():
            name = getattr(layout, part)
            if name not in outputs:
                outputs[name] = self.get_submodule(name)(x)
            found.append(outputs[name][..., rows[part]].reshape(*x.shape[:-1], heads, size))
        return found

    def _turned(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys after the rotation, each pair at its own frequency. cos, sin: (batch, tokens, head_dim)."""
        if self.rotary_index is None:
            cos, sin = cos[:, :, None], sin[:, :, None]
            return q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin
        index = self.rotary_index.long()
        cos, sin = (table[..., torch.cat([index, index], dim=1)] for table in (cos, sin))  # (batch, tokens, kv, qk)
        of_q = (table.repeat_interleave(self.num_key_value_groups, dim=2) for table in (cos, sin))
        return q * next(of_q) + _half_turned(q) * next(of_q), k * cos + _half_turned(k) * sin

    def _dropout(self) -> float:
        if not self.training:
            return 0.0
        found = next(
            (getattr(self, n) for n in ("attention_dropout", "attn_dropout", "dropout") if hasattr(self, n)), 0
        )
        return found.p if isinstance(found, nn.Dropout) else float(found)

    def _extra(self) -> dict[str, Any]:
        """What some attention functions want to know and others ignore."""
        own = {"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"}
        found = {key: getattr(self, name) for key, name in own.items() if hasattr(self, name)}
        if "sliding_window" not in found and getattr(self.config, "sliding_window", None) is not None:
            found["sliding_window"] = self.config.sliding_window
        return found

    def extra_repr(self) -> str:
        return f"heads={self.layout.heads}/{self.layout.kv_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}"


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
