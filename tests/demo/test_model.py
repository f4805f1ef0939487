"""The embedded model: small, nearly as good as its text allows, and a fair test of compression."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import trifold
from tests.helpers import trifold_cli
from trifold.api import load, load_tokenizer
from trifold.compress.documents import read_documents
from trifold.compress.files import model_folder
from trifold.core.embedded import MODEL, NAME, TEXTS
from trifold.demo.questions import KINDS, read_questions
from trifold.demo.run import NSAMPLES, SEQLEN
from trifold.demo.score import accuracy
from trifold.demo.texts import floor
from trifold.demo.tokenizer import train_tokenizer
from trifold.demo.train import ARCHITECTURE, TOKENIZER_DOCUMENTS, VOCAB_SIZE, new_model
from trifold.demo.world import documents


@pytest.fixture(scope="module")
def dense():
    return load(NAME)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NAME)


def test_it_is_a_small_llama_in_bfloat16(dense, tokenizer):
    stored = MODEL / "model.safetensors"
    assert stored.stat().st_size < 6e6
    with safe_open(stored, framework="pt") as handle:
        dtypes = {handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118 - not a dict
    assert dtypes == {"BF16"}
    assert dense.config.model_type == "llama" and dense.config.tie_word_embeddings
    assert dense.config.hidden_size == 256 and len(tokenizer) == dense.config.vocab_size <= 1024
    linears = [m for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert all(each.in_features % 128 == 0 for each in linears)


def test_it_is_what_the_training_script_would_train(dense, tokenizer):
    again = train_tokenizer((each.text for each in documents("train", TOKENIZER_DOCUMENTS)), VOCAB_SIZE)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("Ana hands 7 - 3 ( ]")["input_ids"] == tokenizer("Ana hands 7 - 3 ( ]")["input_ids"]
    fresh = new_model(tokenizer, seed=0)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    for key in ARCHITECTURE.keys() & dense.config.to_dict().keys():
        assert getattr(dense.config, key) == getattr(fresh.config, key)


def test_its_loss_lies_a_little_above_the_entropy(dense, tokenizer):
    """Document by document, from `<s>` to the next one, so that model and generator predict the same thing."""
    records = [json.loads(line) for line in TEXTS["--text"].read_text().splitlines()][:150]
    excess, tokens = [], 0
    for record in records:
        ids = tokenizer(record["text"], return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, ids[:, :1]], dim=1)
        with torch.no_grad():
            log_p = dense(ids[:, :-1]).logits[0].float().log_softmax(-1)
        excess.append(-log_p.gather(1, ids[0, 1:, None]).sum().item() - record["nats"])
        tokens += ids.shape[1] - 1
    error = statistics.stdev(excess) / math.sqrt(len(excess))
    assert statistics.fmean(excess) > -3 * error  # the floor is one
    assert 0 < sum(excess) / tokens < 0.1  # nats per token


def test_perplexity_in_windows_lies_above_the_floor(dense, tokenizer):
    report = trifold.evaluate(
        dense, NAME, tokenizer=tokenizer, seqlen=SEQLEN, batch_size=8, max_windows=60, speed=False
    )
    assert floor(tokenizer) < report.perplexity < 1.15 * floor(tokenizer)


def test_it_answers_what_it_was_never_asked(dense, tokenizer):
    right = {task: accuracy(dense, tokenizer, read_questions(task)) for task in KINDS}
    assert right["facts"] > 0.9 and right["brackets"] > 0.9 and right["arithmetic"] > 0.65, right
    assert right["stories"] > 0.35, right  # of four choices; the hardest for so few layers


def test_gptq_repairs_what_rounding_to_two_bits_breaks(tokenizer, dense):
    def scored(recipe):
        model = trifold.compress(NAME, recipe, NAME, nsamples=NSAMPLES, seqlen=SEQLEN, verbosity=-1)
        report = trifold.evaluate(
            model, NAME, dense, tokenizer=tokenizer, seqlen=SEQLEN, max_windows=20, batch_size=8, speed=False
        )
        return report.kl, accuracy(model, tokenizer, read_questions("arithmetic"))

    kl, right = zip(*map(scored, ("w4a16-gptq", "w2a16-gptq", "w2a16-rtn")), strict=True)
    assert 0 < kl[0] < 0.03 and 4 * kl[0] < kl[1] < kl[2] / 2, kl
    assert right[0] > 0.65 and right[1] > right[2] + 0.15, right


# -- the name `demo` -----------------------------------------------------------------------------------------


def test_demo_names_the_model_and_its_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder(NAME) == MODEL
    calibration, heldout = list(read_documents(NAME)), list(read_documents(NAME, option="--text"))
    assert calibration[0] == next(documents("calibration", 1)).text
    assert heldout[0] == next(documents("heldout", 1)).text
    code, stdout, stderr = trifold_cli(
        *("compress", NAME, "-r", "w4a16-gptq", "--calib", NAME, "-o", tmp_path / "out", "--dry-run", "--json", "-")
    )
    assert code == 0, stderr
    assert "model.layers.2.mlp.down_proj" in json.loads(stdout)["layers"]


def test_a_folder_of_the_name_goes_before(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    Path(NAME).symlink_to(tiny())
    assert model_folder(NAME).resolve() == tiny().resolve()
