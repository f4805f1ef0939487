"""Where the int8 op for GPUs stands in the dispatch, and why it refuses; its values are in `triton_checks`."""

import pytest
import torch
from packed_samples import layer, quantized

from trifold.kernels import explain
from trifold.kernels.rounded_input import triton_int8

SPEC = layer(quantized(64, 192, 8, "channel", False), input_bits=8).spec


def test_it_is_chosen_on_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_int8, "no_gpu", lambda device: None)
    assert explain(SPEC, torch.bfloat16, "cuda").op == "rounded_input.triton_int8"
    static = SPEC | {"input": {"bits": 8, "static": True}, "symmetric": True}
    assert explain(static, torch.float16, "cuda").op == "rounded_input.triton_int8"
    assert explain(SPEC, torch.bfloat16, "cpu").rejected.get("rounded_input.triton_int8") in (
        None,  # one that is preferred took it
        "runs on cuda, not cpu",
    )


@pytest.mark.parametrize(
    "change, dtype, word",
    [
        ({"bits": 4}, torch.bfloat16, "bits=4 are not 8"),
        ({"group_size": 64}, torch.bfloat16, "group_size=64 is neither 'channel' nor 'tensor'"),
        ({"shape": [64, 70000]}, torch.bfloat16, "in_features=70000 could overflow an int32 sum"),
        ({}, torch.float64, "too coarse for torch.float64"),
    ],
)
def test_it_says_why_not(monkeypatch, change, dtype, word):
    monkeypatch.setattr(triton_int8, "no_gpu", lambda device: None)
    choice = explain(SPEC | change, dtype, "cuda")
    assert word in choice.rejected["rounded_input.triton_int8"]
    assert choice.op == "rounded_input.blockwise"
