"""What is likely to be wrong with a calibration text, told before the run: warnings, not errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch

from trifold.compress.plan import Plan
from trifold.compress.text import Windows
from trifold.core.statistics import Gram

_INSTRUCT = re.compile(r"(?i)(?:^|[-_/. ])(?:instruct|chat|it|sft|dpo)(?:$|[-_/. 0-9])")
_MANY = 0.1  # share of windows that is worth a line
_PASSAGE = 32  # tokens
_MANY_PASSAGES = 0.25  # code and licences repeat themselves a little anyway
_FACTOR = 6364136223846793005  # Knuth's, of a linear congruential generator modulo 2**64
_MESSAGE = "What is the capital of Mongolia?"


def lint(windows: Windows, plan: Plan, tokenizer: Any, name: str) -> tuple[str, ...]:
    """One line for each finding. tokenizer: may be None. name: the model's."""
    lines = [*_rank(windows, plan), *_repeated(windows)]
    if tokenizer is not None:
        lines += [*_beginnings(windows, tokenizer), *_cut(windows, tokenizer), *_template(windows, tokenizer, name)]
    return tuple(lines)


def _rank(windows: Windows, plan: Plan) -> Iterator[str]:
    """Fewer tokens than inputs leave a Gram matrix singular: damping then decides part of the solution."""
    widths = {name: layer.shape[1] for name, layer in plan.layers.items() if Gram in layer.method.gathers}
    widest = max(widths, key=lambda name: widths[name], default="")
    if widest and windows.total_tokens < widths[widest]:
        enough = -(-widths[widest] // windows.seqlen)
        yield (
            f"{windows.source}: {windows.total_tokens} tokens are fewer than the {widths[widest]} inputs of {widest}, "
            f"whose Gram matrix is then singular; {enough} windows of {windows.seqlen} tokens are the least"
        )


def _repeated(windows: Windows) -> Iterator[str]:
    """Whole windows; else passages of `_PASSAGE` tokens, wherever they lie in their windows."""
    found = [window.numpy().tobytes() for window in windows.ids]
    again = len(found) - len(set(found))
    if again > _MANY * len(found):
        yield f"{windows.source}: {again} of {len(found)} windows repeat others; they add no information"
        return
    hashes = torch.cat([_passages(window) for window in windows.ids])
    share = 1 - len(hashes.unique()) / max(len(hashes), 1)
    if share > _MANY_PASSAGES:
        yield (
            f"{windows.source}: {100 * share:.0f} % of its passages of {_PASSAGE} tokens repeat others word for word; "
            "they add no information"
        )


def _passages(window: torch.Tensor) -> torch.Tensor:
    """A hash of every `_PASSAGE` tokens in a row, int64: a polynomial that overflows."""
    count = max(len(window) - _PASSAGE + 1, 0)
    hashes = torch.zeros(count, dtype=torch.int64)
    for place in range(_PASSAGE):
        hashes = hashes * _FACTOR + window[place : place + count]
    return hashes


def _cut(windows: Windows, tokenizer: Any) -> Iterator[str]:
    """Documents that no window holds whole, found by the BOS tokens before them."""
    bos = tokenizer.bos_token_id
    if bos is None or windows.stride != windows.seqlen:
        return
    stream = torch.cat(windows.ids)
    starts = (stream == bos).nonzero().flatten().tolist()
    lengths = [stop - start for start, stop in itertools.pairwise([*starts, len(stream)])]
    longer = sum(length > windows.seqlen for length in lengths)
    if 2 * longer > len(lengths) > 1:
        yield (
            f"{windows.source}: {longer} of {len(lengths)} documents are longer than a window of {windows.seqlen} "
            "tokens and are cut; a larger seqlen shows more of what the model sees in use"
        )


def _beginnings(windows: Windows, tokenizer: Any) -> Iterator[str]:
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return
    without = sum(not bool((window == bos).any()) for window in windows.ids)
    if without > len(windows.ids) / 2 and not windows.bos.startswith(tokenizer.bos_token):
        yield (
            f"{windows.source}: {without} of {len(windows.ids)} windows hold no {tokenizer.bos_token}, with which the "
            "tokenizer begins every text; tokenise with special tokens"
        )


def _template(windows: Windows, tokenizer: Any, name: str) -> Iterator[str]:
    if not getattr(tokenizer, "chat_template", None):
        if _INSTRUCT.search(name):
            yield f"{name}: looks like a model for chats, but its tokenizer has no chat template to calibrate with"
        return
    shown = _mark(tokenizer)
    if shown and not any(shown in tokenizer.decode(window) for window in windows.ids):
        yield (
            f"{windows.source}: no window holds {shown}, so the text is not in the model's chat template; if the model "
            "will be used for chats, calibrate on templated ones"
        )


def _mark(tokenizer: Any) -> str:
    """What the chat template writes right before a message; empty if that is nothing of its own."""
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MESSAGE}], tokenize=False)
    except Exception:  # templates are programs and fail in any way
        return ""
    before = text.partition(_MESSAGE)[0]
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        before = before.replace(token, "") if token else before
    return next((line.strip() for line in reversed(before.splitlines()) if line.strip()), "")
