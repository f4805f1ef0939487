import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trifold.compress.text import windows_from_samples
from trifold.eval import evaluate_windows, perplexity
from trifold.eval import forward as forward_module
from trifold.eval.forward import device_of, evaluating, forward_logits


class Table(nn.Module):
    """Logits of the next token are a row of `table`, chosen by the present token."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, use_cache):
        assert not use_cache
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(31, (length,), generator=generator) for length in (9, 9, 9, 5, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_model_has_the_perplexity_of_its_vocabulary(dtype):
    windows = windows_from_samples([[0, 1, 2], [3, 4]], None, 8, None)
    result = perplexity(Table(torch.full((7, 7), 3.0, dtype=dtype)), windows)
    assert result.perplexity == pytest.approx(7.0, rel=1e-6)
    assert result.loss == pytest.approx(math.log(7), rel=1e-6)
    assert result.tokens == 3
    assert result.window_losses == pytest.approx([math.log(7)] * 2, rel=1e-6)


def test_hand_computed_loss_is_weighted_by_tokens():
    # After 0: 1 with probability 3/4; after 1: 0 with probability 1/5.
    table = torch.tensor([[1 / 4, 3 / 4], [1 / 5, 4 / 5]]).log()
    windows = windows_from_samples([[0, 1, 0, 1], [0, 1]], None, 8, None)
    result = perplexity(Table(table), windows)
    likely, unlikely = -math.log(3 / 4), -math.log(1 / 5)
    assert result.tokens == 4
    assert result.window_losses == pytest.approx([(2 * likely + unlikely) / 3, likely])
    assert result.loss == pytest.approx((3 * likely + unlikely) / 4)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_equals_the_loss_of_transformers(llama, samples):
    windows = windows_from_samples(samples, None, 9, None)
    result = perplexity(llama, windows)
    with torch.no_grad():
        expected = [llama(input_ids=ids[None], labels=ids[None]).loss.item() for ids in samples]
    assert result.window_losses == pytest.approx(expected, rel=1e-5)
    assert result.tokens == sum(len(ids) - 1 for ids in samples)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batch_size_changes_nothing(llama, samples, batch_size):
    windows = windows_from_samples(samples, None, 9, None)
    one, many = perplexity(llama, windows), perplexity(llama, windows, batch_size)
    assert many.window_losses == pytest.approx(one.window_losses, rel=1e-5)
    assert many.tokens == one.tokens


def test_stride_scores_every_token_once_with_more_context(llama):
    ids = torch.randint(31, (12,), generator=torch.Generator().manual_seed(2))
    windows = windows_from_samples([ids[0:6], ids[2:8], ids[4:10], ids[6:12]], None, 6, None)
    windows = type(windows)(**{**vars(windows), "stride": 2})
    result = perplexity(llama, windows)
    expected = []
    for position in range(1, 12):
        start = 0 if position < 6 else 2 * ((position - 6) // 2 + 1)
        with torch.no_grad():
            logits = llama(input_ids=ids[None, start:position]).logits[0, -1].double()
        expected.append(-logits.log_softmax(-1)[ids[position]].item())
    assert result.tokens == 11
    assert result.loss == pytest.approx(sum(expected) / 11, rel=1e-5)
    assert result.window_losses[0] == pytest.approx(sum(expected[:5]) / 5, rel=1e-5)
    assert result.window_losses[3] == pytest.approx(sum(expected[9:]) / 2, rel=1e-5)


def test_chunks_of_predictions_add_up(llama, samples, monkeypatch):
    windows = windows_from_samples(samples, None, 9, None)
    whole = evaluate_windows(llama, windows, llama)
    monkeypatch.setattr(forward_module, "_ROWS", 3)
    chunked = evaluate_windows(llama, windows, llama)
    assert chunked.model.window_losses == pytest.approx(whole.model.window_losses, rel=1e-6)
    assert chunked.divergence == whole.divergence


def test_huge_and_undefined_losses_do_not_raise():
    windows = windows_from_samples([[0, 1]], None, 8, None)
    assert perplexity(Table(torch.tensor([[2000.0, 0.0]] * 2)), windows).perplexity == math.inf
    assert math.isnan(perplexity(Table(torch.full((2, 2), math.nan)), windows).perplexity)


def test_training_mode_is_put_back():
    model = Table(torch.zeros(3, 3)).train()
    with pytest.raises(ValueError, match="stop"), evaluating(model):
        assert not model.dropout.training
        raise ValueError("stop")
    assert model.training
    assert model.dropout.training
    model.dropout.eval()
    forward_logits(model, torch.tensor([[0, 1]]))
    assert model.training
    assert not model.dropout.training
    assert torch.is_grad_enabled()


def test_device_of_models_without_parameters():
    assert device_of(Table(torch.zeros(2, 2))) == torch.device("cpu")
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
