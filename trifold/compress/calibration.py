"""Calibration text -> batches of token ids, whatever form the text comes in."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from trifold.compress.documents import read_documents
from trifold.compress.text import Windows, clamp_seqlen, windows_from_documents, windows_from_samples
from trifold.core.errors import CalibrationError

TOKENS_PER_BATCH = 1024
CALIBRATION_TOKENS = {"cpu": 512, "cuda": 8192}  # per forward pass while blocks are compressed
PROOF_WINDOWS, PROOF_LENGTH = 2, 64

Calibration = str | os.PathLike[str] | Iterable[Any]


def text_windows(
    text: Calibration,
    tokenizer: Any,
    config: Any,
    limit: int | None,
    seqlen: int,
    stride: int | None = None,
    option: str = "--calib",
) -> Windows:
    """At most `limit` windows from a file, a dataset name, or an iterable of texts or token ids.

    seqlen is clamped to the model's context with a notice. `option` is the command-line option that messages
    suggest. Raises CalibrationError for text that cannot be used.
    """
    seqlen, notice = clamp_seqlen(seqlen, config)
    vocabulary = getattr(_text_config(config), "vocab_size", None)
    if isinstance(text, str | os.PathLike):
        if tokenizer is None:
            raise CalibrationError(
                f"{text}: the model has no tokenizer that can be read; give token ids from Python instead"
            )
        documents = read_documents(text, option)
        windows = windows_from_documents(
            documents, tokenizer, seqlen, limit, stride, source=os.fspath(text), vocab_size=vocabulary
        )
    elif not isinstance(text, Iterable):
        raise CalibrationError(f"{type(text).__name__} is no text; give a file, a dataset name, or texts or token ids")
    else:
        windows = windows_from_samples(text, tokenizer, seqlen, limit, vocab_size=vocabulary)
    return replace(windows, notices=(notice, *windows.notices)) if notice else windows


def _text_config(config: Any) -> Any:
    return getattr(config, "get_text_config", lambda: config)()


def random_windows(config: Any, seed: int) -> Windows:
    """Seeded random tokens for the proof of a recipe that needs no text."""
    length, _ = clamp_seqlen(PROOF_LENGTH, config)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, _text_config(config).vocab_size, (PROOF_WINDOWS, length), generator=generator)
    return windows_from_samples(list(ids), None, length, None, source="random tokens")


def default_batch_size(windows: Windows, tokens: int = TOKENS_PER_BATCH) -> int:
    """Windows per forward pass: about so many tokens."""
    return max(1, tokens // windows.seqlen)
