"""The command line from end to end: compress, inspect, eval, generate, recipes."""

import json
import math
import runpy
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trifold
from tests.helpers import contents, trifold_cli, write_text
from trifold.compress.presets import preset_names
from trifold.compress.recipe import Recipe
from trifold.core.version import VERSION

SMALL = ("--set", "group_size=32", "--nsamples", "8", "--seqlen", "32")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """A compressed checkpoint: folder, stdout, stderr, text."""
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "calib.jsonl")
    arguments = ("compress", tiny(), "-r", "w4a16-gptq", "-o", folder / "out", "--calib", text, *SMALL)
    code, stdout, stderr = trifold_cli(*arguments)
    assert code == 0, stderr
    return folder / "out", stdout, stderr, text


def as_json(*arguments):
    """What a command prints with `--json -`: one JSON document and nothing else."""
    code, stdout, stderr = trifold_cli(*arguments, "--json", "-")
    assert code == 0, stderr
    return json.loads(stdout)


# -- compress ------------------------------------------------------------------------------------------------


def test_compress_tells_what_it_did(made):
    out, stdout, stderr, _ = made
    report = json.loads((out / "report.json").read_text())
    assert str(out) in stdout
    for fact in ("w4a16-gptq", "21", f"{report['bits_per_weight']:.3f}", f"{report['mean_error']:.3e}", "max_abs"):
        assert fact in stdout
    blocks = [line for line in stderr.splitlines() if line.startswith("block ")]
    assert [line.split()[1] for line in blocks] == ["1/3", "2/3", "3/3"]
    assert all("mean error" in line and "ETA" in line and "peak memory" in line for line in blocks)


def test_compress_quiet(tmp_path, tiny):
    code, stdout, stderr = trifold_cli("compress", tiny(), "-r", "w8a16", "-o", tmp_path / "out", "-q")
    assert (code, stdout, stderr) == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_compress_verbose_has_a_line_for_every_layer(tmp_path, tiny):
    _, _, stderr = trifold_cli("compress", tiny(), "-r", "w8a16", "-o", tmp_path / "out", "-v")
    lines = [line for line in stderr.splitlines() if line.startswith("model.layers.")]
    assert len(lines) == 21 and all("error" in line and "bits" in line for line in lines)


def test_compress_json_is_the_report(tmp_path, tiny):
    out = tmp_path / "out"
    report = as_json("compress", tiny(), "-r", "w8a16", "-o", out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["recipe"] == Recipe.load("w8a16").to_dict()
    assert report["calibration"] is None and len(report["layers"]) == 21


def test_compress_json_to_a_file_keeps_the_table(tmp_path, tiny):
    report = tmp_path / "report.json"
    arguments = ("compress", tiny(), "-r", "w8a16", "-o", tmp_path / "out", "--json", report)
    _, stdout, _ = trifold_cli(*arguments)
    assert "bits per weight" in stdout and json.loads(report.read_text())["dtype"] == "float32"


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path, tiny, text):
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    arguments = ("compress", tiny(), "-r", "w4a16-gptq", "-o", tmp_path / "out", "--calib", text, *SMALL, "--dry-run")
    code, stdout, _ = trifold_cli(*arguments)
    plan = as_json(*arguments)
    assert code == 0
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before
    assert len(plan["layers"]) == 21
    entry = plan["layers"]["model.layers.2.mlp.down_proj"]
    assert entry["shape"] == [48, 86] and entry["method"] == "gptq" and entry["input"] is None
    scheme = {"bits": 4, "group_size": 32, "symmetric": False, "scale_dtype": "bfloat16"}
    assert entry["scheme"] == {**scheme, "grid": "int", "zero_point": "integer"}
    assert all(name in stdout for name in plan["layers"])


def test_dry_run_finds_what_is_wrong(tmp_path, tiny):
    arguments = ("compress", tiny(), "-r", "w4a16-gptq", "-o", tmp_path / "out", "--dry-run")
    assert trifold_cli(*arguments)[0] == 2


def test_options_reach_the_recipe(tmp_path, tiny, text):
    more = ("--seed", "7", "--batch-size", "3", "--dtype", "bfloat16", "--set", "gptq.bits=3")
    arguments = ("compress", tiny(), "-r", "w4a16-gptq", "-o", tmp_path / "out", "--calib", text, *SMALL, *more)
    report = as_json(*arguments)
    assert (report["recipe"]["nsamples"], report["recipe"]["seqlen"], report["seed"]) == (8, 32, 7)
    assert report["recipe"]["steps"][0]["scheme"]["bits"] == 3
    assert (report["batch_size"], report["dtype"]) == (3, "bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


# -- inspect -------------------------------------------------------------------------------------------------


def test_inspect_counts_what_is_in_the_files(made, tiny):
    out = made[0]
    summary = as_json("inspect", out)
    tensors, dense = load_file(out / "model.safetensors"), load_file(tiny() / "model.safetensors")
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    report = json.loads((out / "report.json").read_text())
    packed = dict.fromkeys(modules, 0)
    for key, tensor in tensors.items():
        name = key.rpartition(".")[0]
        if name in packed:
            packed[name] += tensor.nbytes
    elements = {name: dense[f"{name}.weight"].numel() for name in modules}
    assert summary["bits_per_weight"] == 8 * sum(packed.values()) / sum(elements.values())
    assert summary["total_bytes"] == sum(t.nbytes for t in tensors.values())
    assert summary["dense_bytes"] == sum(t.nbytes for t in dense.values())
    all_elements = sum(t.numel() for t in dense.values())
    assert summary["model_bits_per_weight"] == 8 * summary["total_bytes"] / all_elements
    assert summary["layers"].keys() == modules.keys() == report["layers"].keys()
    for name, layer in summary["layers"].items():
        assert layer["bytes"] == packed[name]
        assert layer["bits_per_weight"] == 8 * packed[name] / elements[name]
        assert layer["shape"] == list(dense[f"{name}.weight"].shape)
        assert layer["error"] == report["layers"][name]["error"] and layer["error_of"] == "output"
        assert layer["describe"] == "int4 g32 asym"


def test_inspect_table_names_every_layer_in_full(made):
    _, stdout, _ = trifold_cli("inspect", made[0])
    summary = as_json("inspect", made[0])
    assert all(name in stdout for name in summary["layers"])
    for fact in ("int4 g32 asym", "48x86", f"{summary['bits_per_weight']:.3f}", "85.42 kB", "282.05 kB"):
        assert fact in stdout


def test_inspect_counts_transposed_layers_biases_and_quantised_inputs(tmp_path, tiny):
    folder = tiny("gpt2")
    trifold.compress(folder, "w8a8", None, tmp_path / "out", verbosity=-1)
    summary = as_json("inspect", tmp_path / "out")
    tensors, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert summary["total_bytes"] == sum(t.nbytes for t in tensors.values())
    assert summary["dense_bytes"] == sum(t.nbytes for t in dense.values())
    layer = summary["layers"]["transformer.h.0.attn.c_attn"]
    assert layer["shape"] == [144, 48] and layer["describe"] == "int8 channel sym a8"
    assert layer["bits_per_weight"] == 8 + 16 / 48  # one bfloat16 scale per row


def test_inspect_without_report_has_no_errors(made, tmp_path):
    copy = tmp_path / "[copy]"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((made[0] / name).read_bytes())
    assert as_json("inspect", copy)["layers"]["model.layers.0.mlp.up_proj"]["error"] is None
    assert "[copy]" in trifold_cli("inspect", copy)[1]  # not taken for markup


@pytest.mark.parametrize(("name", "fact"), [("dense", "the model is dense"), ("absent", "no such model folder")])
def test_inspect_of_something_else(tmp_path, tiny, name, fact):
    code, stdout, stderr = trifold_cli("inspect", {"dense": tiny(), "absent": tmp_path / "absent"}[name])
    assert (code, stdout) == (2, "") and stderr.startswith("error: ") and fact in stderr


# -- eval ----------------------------------------------------------------------------------------------------


def test_eval_numbers(made, tiny):
    out, _, _, text = made
    arguments = ("eval", out, "--baseline", tiny(), "--text", text, "--seqlen", "32", "--max-windows", "5")
    report = as_json(*arguments)
    tokenizer = AutoTokenizer.from_pretrained(out)
    stream = []
    for line in text.read_text().splitlines():
        stream += [0, *tokenizer(json.loads(line)["text"])["input_ids"]]
    ids = torch.tensor(stream[: 5 * 32]).reshape(5, 32)
    model, dense = trifold.load(out), AutoModelForCausalLM.from_pretrained(tiny())
    with torch.no_grad():
        q, p = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (model, dense))
    loss, dense_loss = (-x.gather(-1, ids[:, 1:, None]).mean() for x in (q, p))
    assert report["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert report["baseline"]["perplexity"] == pytest.approx(math.exp(dense_loss), rel=1e-5)
    assert report["tokens"] == 5 * 31 and report["windows"] == 5
    assert report["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert report["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert report["decode_tokens_per_s"] > 0
    assert report["peak_memory_bytes"] > 2**26


def test_eval_of_a_model_against_itself(made, tiny):
    arguments = ("eval", tiny(), "--baseline", tiny(), "--text", made[3], "--seqlen", "32", "--max-windows", "3")
    report = as_json(*arguments, "--no-speed")
    assert report["kl"] == pytest.approx(0, abs=1e-9) and report["top1_agreement"] == 1
    assert report["decode_tokens_per_s"] is None


def test_eval_table_and_quiet(made, tmp_path):
    out, _, _, text = made
    arguments = ("eval", out, "--text", text, "--seqlen", "32", "--max-windows", "3", "--no-speed")
    code, stdout, stderr = trifold_cli(*arguments)
    assert code == 0 and stderr == ""
    assert all(fact in stdout for fact in ("perplexity", "93 in 3 windows of 32", "<s> (id 0)", "peak memory"))
    assert "KL" not in stdout and "decoding" not in stdout
    code, stdout, stderr = trifold_cli(*arguments, "-q", "--json", tmp_path / "eval.json")
    assert (code, stdout, stderr) == (0, "", "")
    assert json.loads((tmp_path / "eval.json").read_text())["kl"] is None


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--text", "absent.txt"), "absent.txt: no such file; give an existing file (--text FILE)"),
        (("--text", "wikitext"), "--text FILE"),
        (("--seqlen", "1"), "seqlen=1"),
        (("--seqlen", "16", "--stride", "17"), "stride=17: must lie between 1 and seqlen=16"),
        (("--seqlen", "16", "--stride", "0"), "stride=0"),
        (("--max-windows", "0"), "--max-windows"),
        (("--baseline", "absent"), "'absent': no such model folder"),
        (("--json", "absent/eval.json"), "--json absent/eval.json: cannot be written"),
    ],
)
def test_eval_of_wrong_input(made, arguments, fact):
    out, _, _, text = made
    code, stdout, stderr = trifold_cli("eval", out, "--no-speed", "--text", text, *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and fact in stderr


# -- generate ------------------------------------------------------------------------------------------------


def test_generate_greedily_and_by_sampling(made):
    out = made[0]
    code, greedy, stderr = trifold_cli("generate", out, "--prompt", "w1 w2 w3", "--max-new-tokens", "6")
    assert code == 0 and stderr == "" and greedy.startswith("w1 w2 w3 ")
    model, tokenizer = trifold.load(out), AutoTokenizer.from_pretrained(out)
    ids = model.generate(**tokenizer("w1 w2 w3", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert greedy == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    sampled = [
        trifold_cli("generate", out, "--prompt", "w1", "--temperature", "2", "--seed", seed)[1] for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("--prompt", ""), "--prompt ''"),
        (("--prompt", "w1", "--temperature", "-1"), "--temperature"),
        (("--prompt", "w1", "--device", "nonsense"), "--device nonsense"),
        (("--prompt", "w1", "--max-new-tokens", "0"), "--max-new-tokens"),
        ((), "--prompt"),
    ],
)
def test_generate_from_wrong_input(made, arguments, fact):
    code, stdout, stderr = trifold_cli("generate", made[0], *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and fact in stderr


# -- recipes, help, version ----------------------------------------------------------------------------------


def test_recipes_lists_every_preset():
    code, stdout, _ = trifold_cli("recipes")
    assert code == 0 and [line.split()[0] for line in stdout.splitlines()] == preset_names()
    assert "awq + gptq" in stdout


@pytest.mark.parametrize("name", preset_names())
def test_a_printed_recipe_is_the_preset(tmp_path, name):
    code, stdout, _ = trifold_cli("recipes", name)
    assert code == 0 and yaml.safe_load(stdout)["name"] == name
    (tmp_path / "mine.yaml").write_text(stdout)
    assert Recipe.load(tmp_path / "mine.yaml") == Recipe.load(name)


def test_unknown_recipe_is_answered_with_the_nearest():
    code, stdout, stderr = trifold_cli("recipes", "w4a16-gptp")
    assert (code, stdout) == (2, "") and "did you mean w4a16-gptq" in stderr


@pytest.mark.parametrize(
    "command", ["", "compress", "eval", "inspect", "generate", "recipes", "bench", "build-kernels"]
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(command, option):
    code, stdout, stderr = trifold_cli(*filter(None, (command, option)))
    assert (code, stderr) == (0, "") and f"Usage: trifold {command}".strip() in stdout


def test_no_command_shows_the_help():
    code, _, stderr = trifold_cli()
    assert code == 2 and "Usage: trifold" in stderr and "compress" in stderr
    code, _, stderr = trifold_cli("kompress")
    assert code == 2 and stderr.startswith("error: ") and "kompress" in stderr


def test_module_and_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trifold", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("trifold", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"trifold, version {VERSION}\n"
