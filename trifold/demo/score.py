"""Multiple-choice accuracy in a fraction of lm-eval's time, and equal to its `acc`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trifold.demo.questions import Question
from trifold.eval.forward import device_of, forward_logits

TOKENS = 4096  # of a forward pass, padding included


def accuracy(model: nn.Module, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Share of questions, 0 to 1, whose right choice is the most likely continuation of the query."""
    scores = choice_scores(model, tokenizer, questions)
    right = sum(max(row, key=row.__getitem__) == each.answer for row, each in zip(scores, questions, strict=True))
    return right / len(questions)


def choice_scores(model: nn.Module, tokenizer: Any, questions: Sequence[Question]) -> list[dict[int, float]]:
    """For each question, choice -> log-probability (nats) of that choice after the query.

    Choices of one token share one pass over their query, and neighbours in length share a batch.
    """
    wanted: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = {}  # input -> (question, choice, its tokens)
    for number, question in enumerate(questions):
        asked = len(tokenizer(question.query)["input_ids"])
        for choice, text in enumerate(question.choices):
            ids = tokenizer(f"{question.query} {text}")["input_ids"]
            wanted.setdefault(tuple(ids[:-1]), []).append((number, choice, ids[asked:]))
    scores: list[dict[int, float]] = [{} for _ in questions]
    for rows in _batches(sorted(wanted, key=len)):
        logits = forward_logits(model, _padded(rows).to(device_of(model)))
        for row, row_logits in zip(rows, logits, strict=True):
            for number, choice, tokens in wanted[row]:
                predictions = row_logits[len(row) - len(tokens) : len(row)].float().log_softmax(-1)
                chosen = torch.tensor(tokens, device=predictions.device)
                scores[number][choice] = predictions.gather(1, chosen[:, None]).sum().item()
    return scores


def _batches(rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive rows, ordered by length, of at most `TOKENS` tokens when padded."""
    held: list[tuple[int, ...]] = []
    for row in rows:
        if held and len(row) * (len(held) + 1) > TOKENS:
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def _padded(rows: list[tuple[int, ...]]) -> Tensor:
    """`[rows, longest]` ids; what follows a row's end cannot change its predictions in a causal model."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
