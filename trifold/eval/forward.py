"""Logits for the predictions that count, one batch of windows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trifold.compress.text import Windows, batches

_ROWS = 256  # predictions at a time: bounds the temporaries over a large vocabulary


class Scored(NamedTuple):
    """The scored predictions of one window: `logits` [n, vocab] in the model's dtype, `targets` [n] int64."""

    logits: Tensor
    targets: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Fp32 logits and targets, a bounded number of predictions at a time."""
        for logits, targets in zip(self.logits.split(_ROWS), self.targets.split(_ROWS), strict=True):
            yield logits.float(), targets


def scored_logits(model: nn.Module, windows: Windows, batch_size: int = 1) -> Iterator[Scored]:
    """For each window, in order, the next-token logits of the tokens that no earlier window has scored.

    The first token of a window only serves as context. With overlapping windows (`stride` < `seqlen`) every
    window but the first scores its last `stride` tokens.
    """
    device = device_of(model)
    index = 0
    for ids in batches(windows, batch_size):
        ids = ids.to(device)
        logits = forward_logits(model, ids)
        for row in range(len(ids)):
            first = ids.shape[1] - windows.scored(index)
            targets = ids[row, first:].to(logits.device)
            yield Scored(logits[row, first - 1 : -1], targets)
            index += 1


def forward_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """`[b, seq, vocab]` logits for `[b, seq]` ids, without gradients, dropout or cache."""
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode inside, in the mode it had before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where `model` takes its inputs: the device of its first parameter or buffer."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
