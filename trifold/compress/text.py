"""From documents to windows of tokens: the same road for calibration and for evaluation.

`windows_from_documents` joins and cuts the documents that `read_documents` gives,
`windows_from_samples` takes what a caller has tokenised already, and `batches` stacks equal windows.
Nothing is ever padded, and the digest of the windows says whether two runs have seen the same tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trifold.core.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
_FIRST_GUESS = 8  # characters per token of a long document; doubled until it is enough
_MARGIN = 64  # tokens before the end of a shortened document that its cut could have changed


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and where they came from.

    `ids`: 1-D int64 tensors of at most `seqlen` tokens, none shorter than 2. `stride`: tokens between the
    starts of neighbouring windows. `bos`: the policy on beginning-of-sequence tokens, in words. `digest`:
    sha256 over all ids. `total_tokens`: the sum of the window lengths (an overlap counts in each).
    `notices`: one line each.
    """

    ids: tuple[Tensor, ...]
    seqlen: int
    stride: int
    bos: str
    source: str
    digest: str
    total_tokens: int
    notices: tuple[str, ...] = ()

    def scored(self, index: int) -> int:
        """How many predictions at the end of window `index` no earlier window has made."""
        predictions = len(self.ids[index]) - 1
        return predictions if index == 0 else min(predictions, self.stride)

    def divided(self, first: int) -> tuple[Windows, Windows]:
        """The first so many windows, with the notices, and those behind them, which may be none."""
        parts = [
            replace(self, ids=ids, digest=_digest(ids), total_tokens=sum(map(len, ids)))
            for ids in (self.ids[:first], self.ids[first:])
        ]
        return parts[0], replace(parts[1], notices=())


def windows_from_documents(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int | None,
    stride: int | None = None,
    *,
    source: str = "documents",
    vocab_size: int | None = None,
) -> Windows:
    """The first `limit` windows (all for None) of `seqlen` tokens from the joined documents.

    Every document with any token is preceded by the BOS token if the tokenizer has one; no other special
    token is added. Windows start every `stride` tokens (default `seqlen`: no overlap). Documents are read
    only until the windows are full. A remainder shorter than `seqlen` is used only if there is no complete
    window.

    Raises CalibrationError for fewer than 2 tokens or an id outside `vocab_size`, InputError for impossible
    sizes.
    """
    stride = seqlen if stride is None else stride
    _check_sizes(seqlen, limit, stride)
    need = None if limit is None else seqlen + (limit - 1) * stride
    bos_id = tokenizer.bos_token_id
    bos = f"{tokenizer.bos_token} (id {bos_id}) before every document"
    if bos_id is None:
        bos = "none: the tokenizer has no BOS token"

    pieces, total = [], 0
    for document in documents:
        ids = _encode(tokenizer, document, None if need is None else need - total)
        if not ids:
            continue
        pieces.append(torch.tensor(ids if bos_id is None else [bos_id, *ids], dtype=torch.int64))
        total += len(pieces[-1])
        if need is not None and total >= need:
            break
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    if len(stream) < 2:
        raise CalibrationError(f"{source}: {len(stream)} token(s), but a window needs at least 2; give more text")

    notices = []
    if len(stream) < seqlen:
        notices.append(f"{source}: {len(stream)} tokens do not fill one window of {seqlen}; using them as they are")
        windows = [stream]
    else:
        starts = range(0, len(stream) - seqlen + 1, stride)[:limit]
        windows = [stream[start : start + seqlen].clone() for start in starts]
    return _finish(windows, seqlen, stride, limit, bos, source, notices, vocab_size)


def windows_from_samples(
    samples: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    limit: int | None,
    *,
    source: str = "samples",
    vocab_size: int | None = None,
) -> Windows:
    """At most `limit` windows from samples in memory, one per sequence, in order.

    A sample is a sequence of ids, a `[batch, seq]` tensor (or list of lists) of ids, or a mapping with
    `input_ids` and perhaps `attention_mask`, whose zeros mark padding to strip. Sequences are cut to
    `seqlen`, never padded; one with fewer than 2 tokens is dropped with a notice. If the first sample is a
    string, all must be, and they are documents for `windows_from_documents`.

    Raises CalibrationError for a sample of another kind, an id outside `vocab_size`, or when nothing is
    left.
    """
    _check_sizes(seqlen, limit, seqlen)
    iterator = iter(samples)
    first = list(itertools.islice(iterator, 1))
    everything = itertools.chain(first, iterator)
    if first and isinstance(first[0], str):
        if tokenizer is None:
            raise CalibrationError(f"{source}: text samples need a tokenizer; give one or pass token ids")
        texts = _only_strings(everything, source)
        return windows_from_documents(texts, tokenizer, seqlen, limit, source=source, vocab_size=vocab_size)

    windows: list[Tensor] = []
    dropped = cut = 0
    for index, sample in enumerate(everything):
        for row in _rows(sample, f"{source}[{index}]"):
            if len(row) < 2:
                dropped += 1
            elif limit is None or len(windows) < limit:
                windows.append(row[:seqlen].clone())
                cut += len(row) > seqlen
        if limit is not None and len(windows) >= limit:
            break
    notices = [f"{source}: {dropped} sample(s) with fewer than 2 tokens dropped"] if dropped else []
    if 2 * cut > len(windows):
        notices.append(f"{source}: {cut} of {len(windows)} samples are cut to {seqlen} tokens")
    if not windows:
        raise CalibrationError(f"{source}: no sample has 2 tokens or more ({dropped} dropped); give longer ones")
    bos = "as in the samples; nothing added"
    return _finish(windows, seqlen, seqlen, limit, bos, source, notices, vocab_size)


def clamp_seqlen(seqlen: int, config: Any) -> tuple[int, str | None]:
    """`seqlen` cut to the context length in the model's `config`, and a notice if that changed it."""
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if callable(get_text_config) else config
    for field in _CONTEXT_FIELDS:
        context = getattr(config, field, None)
        if isinstance(context, int) and 0 < context < seqlen:
            notice = f"seqlen={seqlen} exceeds the model's context ({field}={context}); using {context}"
            return context, notice
    return seqlen, None


def batches(windows: Windows, batch_size: int) -> Iterator[Tensor]:
    """`[b, seq]` int64 tensors, b <= `batch_size`, of consecutive windows of one length, in order."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    for _, group in itertools.groupby(windows.ids, key=len):
        while rows := list(itertools.islice(group, batch_size)):
            yield torch.stack(rows)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, need: int | None) -> list[int]:
    """Ids of `text`; of a text far longer than `need` tokens, those of a beginning that is long enough."""
    size = len(text) if need is None else _FIRST_GUESS * (need + _MARGIN)
    while True:
        encoded = tokenizer(text[:size], add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if size >= len(text):
            return ids
        if need is not None and len(ids) >= need + _MARGIN:
            return ids[:need]
        size *= 2


def _only_strings(samples: Iterable[Any], source: str) -> Iterator[str]:
    for index, sample in enumerate(samples):
        if not isinstance(sample, str):
            kind = type(sample).__name__
            raise CalibrationError(f"{source}[{index}]: {kind} among strings; give text or token ids, not both")
        yield sample


def _rows(sample: Any, where: str) -> list[Tensor]:
    """The 1-D int64 sequences of one sample, stripped by its attention mask."""
    mask = None
    if isinstance(sample, Mapping):
        if "input_ids" not in sample:
            raise CalibrationError(f"{where}: no input_ids (keys: {', '.join(map(str, sample))}); add them")
        sample, mask = sample["input_ids"], sample.get("attention_mask")
    rows = _sequences(sample, where)
    if mask is None:
        return rows
    masks = _sequences(mask, where)
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise CalibrationError(f"{where}: attention_mask and input_ids differ in shape; make them equal")
    return [row[keep != 0] for row, keep in zip(rows, masks, strict=True)]


def _sequences(values: Any, where: str) -> list[Tensor]:
    nested = isinstance(values, Sequence) and len(values) > 0 and not isinstance(values, str)
    if nested and all(isinstance(row, Sequence | Tensor) and not isinstance(row, str) for row in values):
        parts = list(values)
    else:
        parts = [values]
    rows: list[Tensor] = []
    for part in parts:
        try:
            tensor = torch.as_tensor(part, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(f"{where}: {type(part).__name__} is not a sequence of token ids") from error
        if tensor.numel() == 0 and tensor.dim() == 1:
            tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
        whole = not tensor.is_floating_point() and not tensor.is_complex()
        if not whole or tensor.dim() not in (1, 2) or (len(parts) > 1 and tensor.dim() != 1):
            shape = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise CalibrationError(f"{where}: {shape} given; give integer ids [seq] or [batch, seq]")
        rows.extend(torch.atleast_2d(tensor.to(torch.int64)).unbind(0))
    return rows


def _check_sizes(seqlen: int, limit: int | None, stride: int) -> None:
    if seqlen < 2:
        raise InputError(f"seqlen={seqlen}: a window needs at least 2 tokens; use 2 or more")
    if limit is not None and limit < 1:
        raise InputError(f"{limit} windows asked for; use 1 or more")
    if not 1 <= stride <= seqlen:
        raise InputError(f"stride={stride}: must lie between 1 and seqlen={seqlen}")


def _finish(
    ids: Sequence[Tensor],
    seqlen: int,
    stride: int,
    limit: int | None,
    bos: str,
    source: str,
    notices: Sequence[str],
    vocab_size: int | None,
) -> Windows:
    for index, window in enumerate(ids):
        low, high = int(window.min()), int(window.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            bad, end = (low, "negative") if low < 0 else (high, f"outside the vocabulary of {vocab_size}")
            raise CalibrationError(f"{source}: window {index} holds id {bad}, {end}; use the model's tokenizer")
    if limit is not None and len(ids) < limit:
        notices = [*notices, f"{source}: {len(ids)} window(s) instead of the {limit} asked for"]
    total = sum(len(window) for window in ids)
    return Windows(tuple(ids), seqlen, stride, bos, source, _digest(ids), total, tuple(notices))


def _digest(ids: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for window in ids:
        digest.update(len(window).to_bytes(8, "little"))
        digest.update(window.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
