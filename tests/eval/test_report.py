import json
import math
import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trifold.eval
from trifold.compress.text import windows_from_samples
from trifold.eval import EvalReport, PerplexityResult, evaluate, evaluate_windows

KEYS = {
    "perplexity",
    "tokens",
    "kl",
    "top1_agreement",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "loss",
    "windows",
    "seqlen",
    "stride",
    "bos",
    "source",
    "digest",
    "window_losses",
}


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(5)
    return windows_from_samples(torch.randint(23, (3, 8), generator=generator).split(1), None, 8, None, source="here")


def test_report_without_baseline(windows):
    model = tiny_llama(0)
    report = evaluate(model, windows).to_dict()
    assert set(report) == KEYS
    assert report["kl"] is report["top1_agreement"] is None
    assert report["decode_tokens_per_s"] > 0
    assert report["peak_memory_bytes"] > 0
    assert (report["tokens"], report["windows"], report["seqlen"], report["stride"]) == (21, 3, 8, 8)
    assert (report["source"], report["digest"], report["bos"]) == ("here", windows.digest, windows.bos)
    assert report["loss"] == pytest.approx(statistics.fmean(report["window_losses"]))
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert json.loads(json.dumps(report)) == report


def test_report_with_baseline(windows):
    model, dense = tiny_llama(0), tiny_llama(1)
    report = evaluate(model, windows, dense, speed=False)
    scores = evaluate_windows(model, windows, dense)
    entries = report.to_dict()
    assert set(entries) == KEYS | {"baseline"}
    assert entries["decode_tokens_per_s"] is None
    assert (entries["kl"], entries["top1_agreement"]) == scores.divergence
    assert entries["baseline"] == {"perplexity": scores.baseline.perplexity, "loss": scores.baseline.loss}
    assert report.baseline.window_losses == scores.baseline.window_losses


def test_json_holds_no_nan():
    report = EvalReport(
        perplexity=math.inf,
        loss=800.0,
        tokens=1,
        kl=math.nan,
        top1_agreement=0.0,
        decode_tokens_per_s=None,
        peak_memory_bytes=1,
        windows=1,
        seqlen=2,
        stride=2,
        bos="",
        source="",
        digest="",
        window_losses=(math.nan, 1.0),
        baseline=PerplexityResult(math.nan, math.nan, 1, (math.nan,)),
    )
    entries = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (entries["perplexity"], entries["loss"], entries["kl"]) == (None, 800.0, None)
    assert entries["window_losses"] == [None, 1.0]
    assert entries["baseline"] == {"perplexity": None, "loss": None}


def test_public_names_exist():
    assert sorted(trifold.eval.__all__) == trifold.eval.__all__
    assert all(hasattr(trifold.eval, name) for name in trifold.eval.__all__)
