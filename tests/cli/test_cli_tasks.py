"""`trifold eval --tasks`: table, JSON, options, errors."""

import json

import pytest

import trifold
from tests.eval.task_samples import write_tasks
from tests.helpers import trifold_cli, write_text

LM_EVAL = {  # the keys of a results file of lm-eval 0.4.13
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"),
    *("config", "git_hash", "date", "pretty_env_info", "transformers_version", "lm_eval_version", "upper_git_hash"),
    *("tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id", "max_length"),
    *("model_source", "model_name", "model_name_sanitized", "system_instruction", "system_instruction_sha"),
    *("fewshot_as_multiturn", "chat_template", "chat_template_sha", "task_hashes", "total_evaluation_time_seconds"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """A folder of tasks, a checkpoint, a text."""
    folder = tmp_path_factory.mktemp("tasks")
    trifold.compress(tiny(), "w3a16-rtn", None, folder / "w3", settings=["group_size=32"], verbosity=-1)
    return write_tasks(folder / "tasks"), folder / "w3", write_text(folder / "text.jsonl")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """lm-eval starts a dozen programs to describe the machine."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")


def run(*arguments):
    code, stdout, stderr = trifold_cli("eval", *arguments, "--bootstrap-iters", "50")
    assert (code, stderr) == (0, "")
    return stdout


def test_the_json_is_lm_evals_and_ours(made, tiny):
    tasks, out, _ = made
    written = json.loads(run(out, "--tasks", tasks, "--json", "-"))
    assert set(written) == LM_EVAL | {"trifold"}
    assert set(written["results"]) == {"both", "choice", "generate", "rolling", "target"}
    assert written["model_name"] == str(out) and written["config"]["batch_size"] == "auto"
    ours = written["trifold"]
    assert set(ours) == {"model", "versions", "bits_per_weight", "model_bits_per_weight", "truncated_requests"}
    assert ours["versions"]["lm_eval"] == written["lm_eval_version"]
    assert 3 < ours["bits_per_weight"] < ours["model_bits_per_weight"] < 32


def test_a_text_and_a_baseline_beside_the_tasks(made, tiny, tmp_path):
    tasks, out, text = made
    scored = ("--text", text, "--seqlen", "32", "--max-windows", "3", "--no-speed")
    chosen = ("--tasks", "choice,rolling", "--tasks-path", tasks, "--limit", "6", "--num-fewshot", "1", "--seed", "7")
    file = tmp_path / "eval.json"
    stdout = run(out, "--baseline", tiny(), *scored, *chosen, "--batch-size", "2", "--log-samples", "--json", file)
    written = json.loads(file.read_text())
    alone = json.loads(run(out, "--baseline", tiny(), *scored, "--batch-size", "2", "--json", "-"))
    block = written["trifold"]
    for key in set(alone) - {"peak_memory_bytes"}:
        assert block["text"][key] == alone[key]
    assert set(block["baseline"]["lm_eval"]) == (LM_EVAL | {"samples"}) - {"groups"} == set(written) - {"trifold"}
    assert written["n-samples"]["choice"]["effective"] == 6 and written["n-shot"]["choice"] == 1
    assert written["config"]["fewshot_seed"] == 7 and written["config"]["batch_size"] == 2
    assert len(written["samples"]["choice"]) == len(block["baseline"]["lm_eval"]["samples"]["choice"]) == 6
    for task, metrics in block["differences"].items():
        for name, entry in metrics.items():
            value, dense = (each["results"][task][name] for each in (written, block["baseline"]["lm_eval"]))
            assert entry["difference"] == value - dense and entry["n"] == 6 and entry["stderr"] >= 0
    for fact in ("perplexity", "KL to the baseline", "word_perplexity", "acc_norm", "difference"):
        assert fact in stdout
    value, error = (written["results"]["choice"][name] for name in ("acc,none", "acc_stderr,none"))
    assert f"{value:.4f} ± {error:.4f}" in stdout


def test_the_table_and_quiet(made, tiny):
    tasks, _, _ = made
    stdout = run(tiny(), "--tasks", f"{tasks / 'choice.yaml'},{tasks / 'generate.yaml'}", "--limit", "0.25")
    lines = [line for line in stdout.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["choice", "choice", "generate"]
    assert "exact_match (first)" in lines[2] and all(line.split("│")[3].strip() == "6" for line in lines)
    assert "perplexity" not in stdout and "baseline" not in stdout and "cut on the left" not in stdout
    assert run(tiny(), "--tasks", tasks / "choice.yaml", "--limit", "2", "-q") == ""


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--tasks", "absent.yaml"), "'absent.yaml': no such file or folder"),
        (("--tasks", "choice,./absent", "--tasks-path", "TASKS"), "'./absent': no such file or folder"),
        (("--tasks", "choice", "--tasks-path", "absent"), "--tasks-path absent: no such folder"),
        (("--tasks", "TASKS", "--limit", "0"), "limit=0"),
        (("--tasks", "TASKS", "--batch-size", "0"), "--batch-size"),
        (("--tasks", "TASKS", "--batch-size", "big"), "--batch-size"),
        (("--tasks", "TASKS", "--log-samples"), "--log-samples: give --json FILE"),
        (("--tasks", "TASKS", "--baseline", "absent"), "'absent': no such model folder"),
        (("--limit", "3"), "--limit is about tasks; name some with --tasks"),
        (("--tasks-path", "TASKS"), "--tasks-path is about tasks"),
    ],
)
def test_wrong_input(made, tiny, arguments, fact):
    arguments = [str(made[0]) if each == "TASKS" else each for each in arguments]
    code, stdout, stderr = trifold_cli("eval", tiny(), *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and fact in stderr
