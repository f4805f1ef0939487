"""The tasks that come with the package, on the model that does: ours, lm-eval's by hand, dense and packed."""

import json

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import trifold
from tests.helpers import trifold_cli
from trifold.core.embedded import MODEL, NAME, TASKS
from trifold.demo.questions import KINDS

LIMIT = 40


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """lm-eval starts a dozen programs to describe the machine."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")


def by_hand(model):
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        tasks=["trifold_world"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=16,
        limit=LIMIT,
        bootstrap_iters=0,
    )
    return {task: found["results"][task]["acc,none"] for task in (f"trifold_{kind}" for kind in KINDS)}


def test_dense_against_four_bits_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trifold.compress(NAME, "w4a16-gptq", NAME, tmp_path / "w4", nsamples=16, seqlen=256, verbosity=-1)
    code, _, stderr = trifold_cli(
        *("eval", "w4", "--tasks", "demo", "--baseline", "demo", "--dtype", "float32", "--limit", str(LIMIT)),
        *("--bootstrap-iters", "0", "--json", "scores.json", "-q"),
    )
    assert code == 0, stderr
    written = json.loads((tmp_path / "scores.json").read_text())
    dense, packed = by_hand(MODEL), by_hand(tmp_path / "w4")
    assert {task: written["results"][task]["acc,none"] for task in packed} == packed
    assert {task: written["trifold"]["baseline"]["lm_eval"]["results"][task]["acc,none"] for task in dense} == dense
    assert 0.5 < sum(dense.values()) / 4 < 1 and abs(sum(packed.values()) - sum(dense.values())) < 0.4
