"""Training in small: it learns, and the same seed gives the same weights."""

import itertools
import math

import pytest
import torch

from trifold.demo.tokenizer import train_tokenizer
from trifold.demo.train import Schedule, new_model, token_stream, train, training_batches
from trifold.demo.world import documents

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
SCHEDULE = Schedule(steps=30, batch=4, seqlen=64, learning_rate=1e-2, warmup=3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((each.text for each in documents("train", 200)), 400)


def trained(tokenizer, seed=0):
    losses = []
    model = new_model(tokenizer, seed, **SMALL)
    batches = training_batches(tokenizer, SCHEDULE.batch, SCHEDULE.seqlen)
    train(model, batches, SCHEDULE, lambda step, loss: losses.append((step, loss)))
    return model, losses


def test_the_loss_falls_and_the_same_seed_gives_the_same_weights(tokenizer):
    model, losses = trained(tokenizer)
    assert [step for step, _ in losses] == list(range(1, 31))
    assert losses[0][1] == pytest.approx(math.log(len(tokenizer)), rel=0.05)
    assert sum(loss for _, loss in losses[-5:]) / 5 < losses[0][1] - 0.8
    again, same = trained(tokenizer)
    assert same == losses
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    other, _ = trained(tokenizer, seed=1)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_windows_are_the_stream_in_order(tokenizer):
    batches = training_batches(tokenizer, 3, 50)
    seen = torch.cat([next(batches).flatten() for _ in range(4)])
    stream, pieces = token_stream(tokenizer, chunk=7), []
    while sum(map(len, pieces)) < len(seen):
        pieces.append(next(stream))
    assert torch.equal(torch.cat(pieces)[: len(seen)], seen)
    assert all(piece[0] == tokenizer.bos_token_id for piece in pieces)
    assert tokenizer.decode(pieces[0][1:]) == next(documents("train", 1)).text


def test_the_rate_rises_and_then_falls_to_nothing():
    rates = [Schedule(steps=100, warmup=10, learning_rate=1.0).rate(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5) and rates[99] < 1e-3


def test_tokens_are_words_single_digits_and_single_brackets(tokenizer):
    text = "Where is Ana? 198 - 99 = 99\n( [ ] )\tünknown"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id == 0
    pieces = tokenizer.tokenize("198 - 99 = ( [")
    assert [piece for piece in pieces if piece != "Ġ"] == ["1", "9", "8", "Ġ-", "9", "9", "Ġ=", "Ġ(", "Ġ["]
