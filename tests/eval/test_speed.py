from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trifold.core.errors import InputError
from trifold.eval import decode_speed, peak_memory_bytes
from trifold.eval import speed as speed_module


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def record_inputs(model):
    inputs = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    return inputs


def test_decodes_greedily_one_token_at_a_time_after_a_warm_up(llama):
    inputs = record_inputs(llama)
    assert decode_speed(llama, prompt_tokens=5, new_tokens=7, seed=3) > 0
    assert [ids.shape[1] for ids in inputs] == [5] + [1] * 4 + [5] + [1] * 7
    assert torch.equal(inputs[0], inputs[5])
    prompt, decoded = inputs[5], torch.cat(inputs[6:], dim=1)
    expected = llama.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=7,
        min_new_tokens=7,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(torch.cat([prompt, decoded], dim=1), expected)


def test_prompt_comes_from_the_seed(llama):
    inputs = record_inputs(llama)
    for seed in (1, 1, 2):
        decode_speed(llama, prompt_tokens=8, new_tokens=1, seed=seed)
    first, again, other = inputs[0], inputs[4], inputs[8]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rate_is_tokens_over_seconds(llama, monkeypatch):
    clock = iter([0.0, 50.0, 100.0, 150.0, 200.0, 204.0])  # start, first token, end of the warm-up and the run
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: next(clock))
    assert decode_speed(llama, prompt_tokens=4, new_tokens=8) == 2.0


def test_short_context_is_respected(llama):
    inputs = record_inputs(llama)
    decode_speed(llama, prompt_tokens=16, new_tokens=64)
    assert inputs[5].shape[1] + sum(ids.shape[1] for ids in inputs[6:]) == 32
    inputs.clear()
    decode_speed(llama, prompt_tokens=99, new_tokens=1)
    assert [ids.shape[1] for ids in inputs] == [31, 1, 31, 1]


@pytest.mark.parametrize(("prompt", "new"), [(0, 4), (4, 0)])
def test_impossible_sizes(llama, prompt, new):
    with pytest.raises(InputError, match="1 or more"):
        decode_speed(llama, prompt_tokens=prompt, new_tokens=new)


def test_model_without_cache(llama):
    class Cacheless(nn.Module):
        config = llama.config

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 29))

    with pytest.raises(InputError, match="Cacheless: returns no KV cache"):
        decode_speed(Cacheless())


def test_peak_memory_holds_what_was_allocated():
    block = torch.ones(2**24)  # 64 MiB
    peak = peak_memory_bytes()
    assert isinstance(peak, int)
    assert block.numel() * 4 < peak < 2**40
    del block
    assert peak_memory_bytes("cpu") >= peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_cuda():
    block = torch.ones(2**20, device="cuda")
    assert peak_memory_bytes("cuda") == torch.cuda.max_memory_allocated() >= block.numel() * 4
