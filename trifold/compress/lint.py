"""What is likely to be wrong with a calibration text, told before the run: warnings, not errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from trifold.compress.plan import Plan
from trifold.compress.text import Windows
from trifold.core.statistics import Gram

_INSTRUCT = re.compile(r"(?i)(?:^|[-_/. ])(?:instruct|chat|it|sft|dpo)(?:$|[-_/. 0-9])")
_MANY = 0.1  # share of windows or documents that is worth a line


def lint(windows: Windows, plan: Plan, tokenizer: Any, name: str) -> tuple[str, ...]:
    """One line for each finding. tokenizer: may be None. name: the model's."""
    lines = [*_rank(windows, plan), *_repeated(windows, tokenizer)]
    if tokenizer is not None:
        lines += [*_beginnings(windows, tokenizer), *_template(windows, tokenizer, name)]
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


def _repeated(windows: Windows, tokenizer: Any) -> Iterator[str]:
    found = [window.numpy().tobytes() for window in windows.ids]
    kind, bos = "windows", getattr(tokenizer, "bos_token_id", None)
    if len(set(found)) == len(found) and bos is not None:
        kind, found = "documents", [d.numpy().tobytes() for d in _documents(windows.ids, bos) if len(d) > 8]
    again = len(found) - len(set(found))
    if again > _MANY * len(found):
        yield f"{windows.source}: {again} of {len(found)} {kind} repeat others; they add no information"


def _documents(windows: Iterable[torch.Tensor], bos: int) -> list[torch.Tensor]:
    """What lies between two BOS tokens of one window."""
    found = []
    for window in windows:
        starts = (window == bos).nonzero().flatten().tolist()
        found += [window[start:stop] for start, stop in itertools.pairwise(starts)]
    return found


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
    marks = _marks(tokenizer)
    if marks is not None and not any(bool(torch.isin(window, marks).any()) for window in windows.ids):
        shown = tokenizer.convert_ids_to_tokens(marks[0].item())
        yield (
            f"{windows.source}: no window holds {shown}, so the text is not in the model's chat template; if the model "
            "will be used for chats, calibrate on templated ones"
        )


def _marks(tokenizer: Any) -> torch.Tensor | None:
    """Ids of the special tokens that the chat template puts around a message; None if it has none of its own."""
    try:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, return_dict=False)
    except Exception:  # templates are programs and fail in any way
        return None
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    own = sorted({*ids} & special - {tokenizer.bos_token_id, tokenizer.eos_token_id})
    return torch.tensor(own) if own else None
