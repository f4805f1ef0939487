"""How fast a model decodes, and how much memory the process has needed."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from trifold.compress.text import clamp_seqlen
from trifold.core.errors import InputError
from trifold.eval.forward import device_of, evaluating

_WARMUP = 4  # decoded tokens before the clock starts: compiled kernels, allocator, caches


def decode_speed(model: nn.Module, prompt_tokens: int = 16, new_tokens: int = 64, seed: int = 0) -> float:
    """Tokens per second of greedy decoding at batch size 1 with the KV cache, without the prompt's pass.

    The prompt is random ids from `seed`. A model whose context is too short decodes as far as it reaches.
    Raises InputError for impossible sizes and for a model without a KV cache.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise InputError(f"{prompt_tokens} prompt and {new_tokens} new tokens: use 1 or more of each")
    config: Any = model.config
    context, _ = clamp_seqlen(prompt_tokens + new_tokens, config)
    prompt_tokens = min(prompt_tokens, context - 1)
    new_tokens = context - prompt_tokens
    vocab_size = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=generator).to(device)
    with evaluating(model), torch.no_grad():
        timed_decode(model, prompt, min(_WARMUP, new_tokens))
        return new_tokens / timed_decode(model, prompt, new_tokens)[1]


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The process's largest memory so far: resident set on the CPU, allocated by torch on a CUDA `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # the unit of every other system is KiB


def timed_decode(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and for `new_tokens` greedy steps of one token each after it.

    prompt: (batch, tokens) ids on the model's device. Raises InputError for a model without a KV cache.
    """
    _synchronize(prompt.device)
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise InputError(f"{type(model).__name__}: returns no KV cache; evaluate it without speed")
    token = output.logits[:, -1:].argmax(-1).to(prompt.device)
    _synchronize(prompt.device)
    begun = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = output.logits[:, -1:].argmax(-1).to(prompt.device)
    _synchronize(prompt.device)
    return begun - start, time.perf_counter() - begun


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
