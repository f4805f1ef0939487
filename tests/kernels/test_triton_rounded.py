"""Where the 8-bit ops for GPUs stand in the dispatch, and why they refuse; their values are in `triton_checks`."""

import pytest
import torch
from packed_samples import layer, other, quantized

from trifold.kernels import explain, gpu
from trifold.kernels.rounded_input import triton_fp8, triton_int8
from trifold.kernels.rounded_input.triton_fp8 import TritonFP8

SPEC = layer(quantized(64, 192, 8, "channel", False), input_bits=8).spec
FP8 = {"bits": 8, "grid": "fp8_e4m3"}


def fp8_spec(group="channel"):
    return layer(other(64, 384, group, **FP8)).spec | {"input": FP8}


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


def test_fp8_is_chosen_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(triton_fp8, "no_gpu", lambda device, needed: None)
    for group in ("channel", "tensor", 128, 256):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert explain(fp8_spec(group), dtype, "cuda").op == "rounded_input.triton_fp8"


def test_fp8_says_why_not_and_the_next_takes_it(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu.no_gpu.cache_clear()
    choice = explain(fp8_spec(), torch.bfloat16, "cuda")
    assert choice.op == "rounded_input.blockwise"
    assert choice.rejected["rounded_input.triton_fp8"] == "compute capability (8, 0) is below (8, 9)"
    assert explain(SPEC, torch.bfloat16, "cuda").op == "rounded_input.triton_int8"
    gpu.no_gpu.cache_clear()
    assert "group_size=64 is not a multiple of 128" in TritonFP8().supports(fp8_spec(64), torch.float16, "cuda")
    assert "too coarse for torch.float64" in TritonFP8().supports(fp8_spec(), torch.float64, "cuda")
    assert explain(fp8_spec(), torch.bfloat16, "cpu").rejected["rounded_input.triton_fp8"] == "runs on cuda, not cpu"
