import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trifold.compress.text import windows_from_samples
from trifold.core.errors import InputError
from trifold.eval import divergence, evaluate_windows, perplexity


class Table(nn.Module):
    def __init__(self, probabilities):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())
        self.calls = 0

    def forward(self, input_ids, use_cache):
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(3)
    return windows_from_samples(torch.randint(37, (4, 11), generator=generator).split(1), None, 11, None)


def test_a_model_does_not_diverge_from_itself(windows):
    model = tiny_llama(0)
    assert divergence(model, model, windows) == (0.0, 1.0)


def test_hand_computed_divergence():
    dense = Table([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    model = Table([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [1 / 3, 1 / 3, 1 / 3]])
    windows = windows_from_samples([[0, 1, 1, 2], [0, 0]], None, 4, None)  # predictions after 0, 1, 1 and 0
    after_0 = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.3)
    after_1 = 0.8 * math.log(0.8 / 0.6) + 0.1 * math.log(0.1 / 0.3)
    kl, agreement = divergence(model, dense, windows)
    assert kl == pytest.approx((2 * after_0 + 2 * after_1) / 4, rel=1e-5)
    assert agreement == 0.5


def test_equals_kl_in_float64(windows):
    model, dense = tiny_llama(1), tiny_llama(2)
    ids = torch.stack(windows.ids)
    with torch.no_grad():
        log_q = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        log_p = dense(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    for batch_size in (1, 3):
        result = divergence(model, dense, windows, batch_size)
        assert result.kl == pytest.approx(expected, rel=1e-4)
        assert result.top1_agreement == pytest.approx(agreement)
    assert divergence(dense, model, windows).kl != pytest.approx(expected, rel=1e-4)


def test_impossible_tokens_count_nothing():
    dense, model = Table([[0.5, 0.5, 0.0]] * 3), Table([[0.25, 0.75, 0.0]] * 3)
    windows = windows_from_samples([[0, 1]], None, 4, None)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(model, dense, windows).kl == pytest.approx(expected)
    assert divergence(Table([[1.0, 0.0, 0.0]] * 3), dense, windows).kl == math.inf


def test_overlaps_count_once():
    dense, model = Table([[0.5, 0.5], [0.9, 0.1]]), Table([[0.5, 0.5], [0.1, 0.9]])
    windows = windows_from_samples([[1, 1, 0], [1, 0, 0]], None, 3, None)
    windows = type(windows)(**{**vars(windows), "stride": 1})
    kl, agreement = divergence(model, dense, windows)  # after 1, 1 and then 0
    assert kl == pytest.approx(2 / 3 * 0.8 * math.log(9), rel=1e-5)
    assert agreement == pytest.approx(1 / 3)


def test_one_pass_gives_all(windows):
    model, dense = tiny_llama(1), tiny_llama(2)
    scores = evaluate_windows(model, windows, dense)
    assert scores.model == perplexity(model, windows)
    assert scores.baseline == perplexity(dense, windows)
    assert scores.divergence == divergence(model, dense, windows)
    assert evaluate_windows(model, windows) == (scores.model, None, None)
    ours, theirs = Table([[0.5, 0.5]] * 2), Table([[0.5, 0.5]] * 2)
    evaluate_windows(ours, windows_from_samples([[0, 1], [1, 0]], None, 2, None), theirs)
    assert (ours.calls, theirs.calls) == (2, 2)


def test_vocabularies_must_match():
    windows = windows_from_samples([[0, 1]], None, 2, None)
    with pytest.raises(InputError, match="vocabularies differ: model 3, baseline 2"):
        divergence(Table([[0.2, 0.3, 0.5]] * 2), Table([[0.5, 0.5]] * 2), windows)
