"""Wrong input: one clear line, exit code 2, and nothing left behind."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import trifold
from tests.helpers import contents, make_model, save_model, trifold_cli

SMALL = ("--nsamples", "8", "--seqlen", "32")
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def refused(tmp_path):
    """refused(model, *arguments) -> the message of a `trifold compress` that refuses its input."""

    def run(model, *arguments, recipe="w4a16-gptq", output=None):
        output = tmp_path / "out" if output is None else output
        before = contents(tmp_path), sorted(tmp_path.rglob("*"))
        code, stdout, stderr = trifold_cli("compress", model, "-r", recipe, "-o", output, *SMALL, *arguments)
        assert code == 2, stderr
        assert stdout == ""
        *notices, message = stderr.splitlines()
        assert message.startswith("error: ") and not any("error" in notice for notice in notices), stderr
        assert "Traceback" not in stderr
        assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return message.removeprefix("error: ").strip()

    return run


@pytest.fixture
def copy(tmp_path, tiny):
    """copy(**changes of config.json) -> a model folder to damage; None removes an entry."""

    def make(**changes):
        folder = tmp_path / "model"
        shutil.copytree(tiny(), folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


# -- the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent", "./absent", "a/b/c", ""])
def test_missing_folder(refused, text, name):
    message = refused(name, "--calib", text)
    assert f"'{name}': no such model folder" in message and "organisation/name" in message


def test_hub_id_offline_fails_at_once(refused, text, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _seconds: pytest.fail("waited"))
    started = time.perf_counter()
    message = refused("some/model", "--calib", text)
    assert time.perf_counter() - started < 5
    assert message.startswith("some/model: no such folder") and "HF_HUB_OFFLINE" in message


def test_folder_without_config(refused, text, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty", "--calib", text)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForCond"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequence"),
    ],
)
def test_not_a_causal_language_model(refused, text, copy, config, kind):
    folder = copy()
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 128}))
    message = refused(folder, "--calib", text)
    assert kind in message and "not a causal language model; give a decoder" in message


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model_type": "no_such_type"}, ["config.json", "no_such_type"]),
        ({"model_type": None, "architectures": None}, ["config.json", "model_type"]),
        ({"num_attention_heads": "four"}, ["config.json", "num_attention_heads", "four"]),
        ({"head_dim": None, "num_attention_heads": 5}, ["config.json", "48", "5"]),
        ({"hidden_act": "no_such_act"}, ["config.json", "no_such_act"]),
        ({"num_hidden_layers": 0}, ["LlamaForCausalLM", "no list of decoder blocks"]),
        ({"num_hidden_layers": 4}, ["9 tensors missing", "model.layers.3."]),
        ({"hidden_size": 96}, ["[128, 48]", "[128, 96]"]),
        ({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}, ["--trust-remote-code"]),
    ],
)
def test_config_that_makes_no_model(refused, text, copy, changes, facts):
    message = refused(copy(**changes), "--calib", text)
    assert all(fact in message for fact in facts), message


def test_config_that_is_no_json(refused, text, copy):
    folder = copy()
    (folder / "config.json").write_text('{"model_')
    assert "config.json" in refused(folder, "--calib", text)


def test_already_quantised_by_another(refused, text, copy):
    message = refused(copy(quantization_config={"quant_method": "gptq", "bits": 4}), "--calib", text)
    assert "already quantised (gptq); give the dense model" in message


def test_already_quantised_by_us(refused, text, tmp_path, tiny):
    trifold.compress(tiny(), "w8a16", None, tmp_path / "ours", verbosity=-1)
    assert "already quantised (trifold)" in refused(tmp_path / "ours", "--calib", text)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_already_quantised_without_saying_so(refused, text, copy, dtype, name):
    folder = change_tensors(copy(), lambda t: t.update({LAYER: t[LAYER].to(dtype)}))
    message = refused(folder, "--calib", text)
    assert f"{LAYER} is stored as {name}" in message and "already quantised" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [LAYER, "model.norm.weight"])
def test_weight_that_is_not_finite(refused, text, copy, value, name):
    folder = change_tensors(copy(), lambda t: t[name].view(-1)[3].fill_(value))
    message = refused(folder, "--calib", text)
    assert "model.safetensors" in message and f"{name} holds NaN or infinity" in message


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_truncated_safetensors(refused, text, copy, size):
    folder = copy()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = refused(folder, "--calib", text)
    assert str(file) in message and "truncated or not safetensors" in message


def test_no_safetensors(refused, text, copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors; pickled weights" in refused(folder, "--calib", text)


def test_index_that_names_a_missing_shard(refused, text, tmp_path):
    folder = save_model(tmp_path / "parts", shard="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: named in the index but missing" in refused(folder, "--calib", text)


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_index_that_is_none(refused, text, copy, index):
    folder = copy()
    (folder / "model.safetensors.index.json").write_text(index)
    message = refused(folder, "--calib", text)
    assert "not a valid index" in message or "named in the index but missing" in message


def test_missing_tensor(refused, text, copy):
    folder = change_tensors(copy(), lambda t: t.pop(LAYER))
    assert f"1 tensor missing, e.g. {LAYER}" in refused(folder, "--calib", text)


def test_tensor_of_another_shape_is_found_before_work_begins(refused, text, copy):
    folder = change_tensors(copy(), lambda t: t.update({LAYER: t[LAYER][:-1].clone()}))
    assert f"{LAYER} has shape [85, 48], config.json makes it [86, 48]" in refused(folder, "--calib", text)


def test_weight_beyond_the_wanted_dtype(refused, text, copy):
    folder = change_tensors(copy(), lambda t: t[LAYER].mul_(1e6))
    message = refused(folder, "--calib", text, "--dtype", "float16")
    assert f"{LAYER} overflows torch.float16" in message and "bfloat16" in message


def test_tensors_without_a_place_are_left_out(tmp_path, text, copy):
    """As transformers does; old checkpoints hold the rotary table of every layer."""
    plain = trifold_cli("compress", copy(), "-r", "w8a16", "-o", tmp_path / "a")
    odd = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "odd.weight": torch.ones(2)}
    change_tensors(tmp_path / "model", lambda t: t.update(odd))
    more = trifold_cli("compress", tmp_path / "model", "-r", "w8a16", "-o", tmp_path / "b")
    assert plain[0] == more[0] == 0
    assert "model: 1 stored tensor(s) without a place" in more[2] and "odd.weight" in more[2]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("device", ["nonsense", "mps", "cuda:99"])
def test_device_that_is_not_there(refused, text, tiny, device):
    assert f"--device {device}: cannot be used here" in refused(tiny(), "--calib", text, "--device", device)


# -- the recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("w4a16-gptp", ["unknown recipe 'w4a16-gptp'", "did you mean w4a16-gptq"]),
        ("nonsense", ["unknown recipe 'nonsense'", "w4a16-gptq", "w8a8"]),
        ("w4a5", ["w4a5", "activations of 5 bits"]),
        ("w17a16", ["w17a16", "bits=17 is outside 1..8"]),
        ("w0a16", ["w0a16", "bits=0 is outside 1..8"]),
        ("absent.yaml", ["absent.yaml", "No such file"]),
        ("", ["unknown recipe ''"]),
    ],
)
def test_recipe_name(refused, text, tiny, name, facts):
    message = refused(tiny(), "--calib", text, recipe=name)
    assert all(fact in message for fact in facts), message


def test_a_folder_named_like_a_preset_is_no_recipe(tmp_path, tiny, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w8a16").mkdir()
    assert trifold_cli("compress", tiny(), "-r", "w8a16", "-o", "out")[0] == 0


@pytest.mark.parametrize(
    ("recipe", "facts"),
    [
        ("{stepz: [], steps: [{method: rtn}]}", ["unknown key 'stepz'", "did you mean steps", "in stepz"]),
        ("steps: [{method: rtn, tragets: [a]}]", ["unknown key 'tragets'", "did you mean targets", "steps.0"]),
        ("steps: [{method: rtn, scheme: {bitz: 4}}]", ["unknown key 'bitz'", "did you mean bits", "steps.0.scheme"]),
        ("steps: [{method: rtn, input: {bit: 8}}]", ["unknown key 'bit'", "did you mean bits", "steps.0.input"]),
        ("steps: [{method: rtn, options: {rangez: mse}}]", ["unknown option 'rangez'", "did you mean ranges"]),
        ("steps: [{method: rtn, options: {ranges: foo}}]", ["ranges", "'minmax' or 'mse'", "found 'foo'"]),
        ("steps: [{method: rtm}]", ["steps.0.method", "unknown method 'rtm'", "did you mean rtn"]),
        ("steps: [{method: [rtn]}]", ["steps.0.method"]),
        ("steps: [{scheme: {bits: 4}}]", ["steps.0.method: Field required"]),
        ("steps: [rtn]", ["steps.0", "mapping", "'rtn'"]),
        ("steps: []", ["steps: List should have at least 1 item"]),
        ("name: x", ["steps: Field required"]),
        ("- method: rtn", ["a recipe is a mapping with `steps`"]),
        ("", ["a recipe is a mapping with `steps`"]),
        ("steps: [", ["cannot be read as YAML"]),
        ("steps: [{method: rtn, scheme: {group_size: 0}}]", ["group_size=0 is below 1", "steps.0.scheme"]),
        ("steps: [{method: rtn, scheme: {group_size: row}}]", ["group_size='row'", "'channel'"]),
        ("steps: [{method: rtn, scheme: {bits: 17}}]", ["bits=17 is outside 1..8"]),
        ("steps: [{method: rtn, scheme: {bits: 0}}]", ["bits=0 is outside 1..8"]),
        ("steps: [{method: rtn, scheme: {bits: true}}]", ["steps.0.scheme.bits", "integer", "True"]),
        ("steps: [{method: rtn, scheme: {bits: 4.5}}]", ["steps.0.scheme.bits", "integer", "4.5"]),
        ("steps: [{method: rtn, scheme: 4}]", ["steps.0.scheme", "mapping", "4"]),
        ("steps: [{method: rtn, input: {bits: 17}}]", ["input bits=17 is outside 2..8"]),
        ("steps: [{method: rtn, options: 3}]", ["steps.0.options", "mapping", "3"]),
        ("steps: [{method: rtn, targets: blocks}]", ["steps.0.targets", "valid list", "'blocks'"]),
        ("{nsamples: -3, steps: [{method: rtn}]}", ["nsamples", "greater than or equal to 1", "-3"]),
        ("{seqlen: 1, steps: [{method: rtn}]}", ["seqlen", "greater than or equal to 2", "1"]),
        ("{seed: often, steps: [{method: rtn}]}", ["seed", "integer", "'often'"]),
        ("steps: [{method: rtn}, {method: rtn}]", ["2 steps are named 'rtn'", "`name`"]),
        (
            "steps: [{method: rtn}, {name: b, method: gptq, targets: ['*q_proj']}]",
            ["model.layers.0.self_attn.q_proj", "both 'rtn' and 'b'", "`ignore`"],
        ),
        ("steps: [{method: rtn, targets: ['*nothing*']}]", ["step 'rtn'", "'*nothing*' fits no linear layer"]),
        ("steps: [{method: rtn, ignore: ['*nothing*']}]", ["step 'rtn'", "'*nothing*' fits no linear layer"]),
        ("steps: [{method: rtn, targets: ['re:(']}]", ["steps.0.targets", "'re:(' is not a regular expression"]),
        ("steps: [{method: rtn, ignore: ['*']}]", ["leaves every layer dense"]),
        ("steps: [{method: awq}]", ["leaves every layer dense", "add a step"]),
        ("steps: [{method: awq, scheme: {bits: 4}}, {method: rtn}]", ["awq takes no scheme"]),
        ("steps: [{method: awq, overrides: [{match: '*'}]}, {method: rtn}]", ["awq takes no overrides"]),
        ("steps: [{method: rtn}, {method: awq}]", ["step 'awq'", "'rtn' has solved", "put 'awq' first"]),
        (
            "steps: [{method: rtn, overrides: [{match: '*q_proj', scheme: {bits: 9}}]}]",
            ["steps.0: overrides.0", "bits=9 is outside 1..8"],
        ),
        (
            "steps: [{method: rtn, overrides: [{match: '*q_proj', scheme: {bitz: 3}}]}]",
            ["steps.0: overrides.0", "unknown key 'bitz'", "did you mean bits"],
        ),
        (
            "steps: [{method: rtn, overrides: [{match: '*q_proj', options: {rangez: mse}}]}]",
            ["steps.0: overrides.0", "unknown option 'rangez'", "did you mean ranges"],
        ),
        (
            "steps: [{method: rtn, overrides: [{match: '*q_proj', bits: 8}]}]",
            ["unknown key 'bits'", "match, options, scheme, skip", "steps.0.overrides.0"],
        ),
        (
            "steps: [{method: rtn, overrides: [{match: '*nothing', skip: true}]}]",
            ["step 'rtn'", "'*nothing' fits no linear layer"],
        ),
    ],
)
def test_recipe_file(refused, text, tiny, tmp_path, recipe, facts):
    file = tmp_path / "mine.yaml"
    file.write_text(recipe)
    message = refused(tiny(), "--calib", text, recipe=file)
    assert all(fact in message for fact in facts), message


def test_a_tied_head_has_no_calibration(refused, text, tiny, tmp_path):
    (tmp_path / "head.yaml").write_text("steps: [{method: gptq, targets: [lm_head]}]")
    message = refused(tiny("llama", tie_word_embeddings=True), "--calib", text, recipe=tmp_path / "head.yaml")
    assert "model.embed_tokens (and of lm_head, which shares it): an embedding has no inputs" in message


@pytest.mark.parametrize(
    ("setting", "facts"),
    [
        ("bitz=3", ["unknown setting 'bitz'", "did you mean bits"]),
        ("gtpq.bits=3", ["unknown setting 'gtpq.bits'", "did you mean gptq.bits"]),
        ("rtn.bits=3", ["unknown setting 'rtn.bits'", "gptq.bits"]),
        (".bits=3", ["unknown setting '.bits'"]),
        ("bits", ["--set bits: write it as key=value"]),
        ("bits=", ["bits", "integer"]),
        ("bits=17", ["bits=17 is outside 1..8"]),
        ("gptq.group_size=0", ["group_size=0 is below 1"]),
        ("act_order=perhaps", ["act_order", "'perhaps'"]),
        ("targets=*nothing*", ["'*nothing*' fits no linear layer"]),
    ],
)
def test_setting(refused, text, tiny, setting, facts):
    message = refused(tiny(), "--calib", text, "--set", setting)
    assert all(fact in message for fact in facts), message


@pytest.mark.parametrize(
    ("option", "value"), [("--nsamples", "-3"), ("--nsamples", "0"), ("--seqlen", "1"), ("--seed", "-1")]
)
def test_impossible_number(refused, text, tiny, option, value):
    message = refused(tiny(), "--calib", text, option, value)
    assert option.removeprefix("--") in message and value in message


# -- the text ------------------------------------------------------------------------------------------------


def test_gptq_without_text(refused, tiny):
    assert "recipe 'w4a16-gptq' needs calibration text; give it with --calib FILE" in refused(tiny())


@pytest.mark.parametrize(
    ("name", "data", "fact"),
    [
        ("empty.txt", b"", "the file is empty"),
        ("blank.txt", b" \n ", "nothing but white space"),
        ("blank.jsonl", b"\n\n", "0 token(s), but a window needs at least 2"),
        ("latin.txt", b"\xe9t\xe9", "not UTF-8"),
        ("wrong.jsonl", b'{"text": "w1"}\n{"txt": "w2"}\n', 'wrong.jsonl:2: no string field "text"'),
    ],
)
def test_text_that_cannot_be_used(refused, tiny, tmp_path, name, data, fact):
    (tmp_path / name).write_bytes(data)
    message = refused(tiny(), "--calib", tmp_path / name)
    assert name in message and fact in message


def test_text_of_one_token(refused, copy, tmp_path):
    folder = copy()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "bos_token": None}))
    (tmp_path / "one.txt").write_text("w7")
    assert "one.txt: 1 token(s), but a window needs at least 2" in refused(folder, "--calib", tmp_path / "one.txt")


def test_short_text_works_with_a_notice(tmp_path, tiny):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    arguments = ("compress", tiny(), "-r", "w4a16-gptq", "-o", tmp_path / "out", "--calib", tmp_path / "short.txt")
    code, _, stderr = trifold_cli(*arguments, *SMALL)
    assert code == 0 and (tmp_path / "out").is_dir()
    assert "short.txt: 4 tokens do not fill one window of 32" in stderr


@pytest.mark.parametrize("name", ["absent.txt", "/absent/text", "./absent"])
def test_missing_text(refused, tiny, name):
    assert f"{name}: no such file" in refused(tiny(), "--calib", name)


def test_dataset_offline_names_the_way_out(refused, tiny):
    message = refused(tiny(), "--calib", "wikitext:wikitext-2-raw-v1:test")
    assert "'wikitext' cannot be fetched offline" in message and "--calib FILE" in message


def test_model_without_tokenizer(refused, text, copy):
    folder = copy()
    (folder / "tokenizer.json").write_text('{"version"')
    assert "no tokenizer that can be read" in refused(folder, "--calib", text)


def test_token_outside_the_vocabulary(refused, text, tmp_path):
    folder = save_model(tmp_path / "model", vocab_size=100)
    assert "outside the vocabulary of 100" in refused(folder, "--calib", text)


# -- the output ----------------------------------------------------------------------------------------------


def test_output_that_is_not_empty(refused, text, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "out: already exists and is not empty" in refused(tiny(), "--calib", text)


def test_output_that_is_a_file(refused, text, tiny, tmp_path):
    (tmp_path / "out").write_text("x")
    assert "out: already exists" in refused(tiny(), "--calib", text)


def test_output_below_a_file(refused, text, tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    message = refused(tiny(), "--calib", text, output=tmp_path / "file" / "out")
    assert f"{tmp_path / 'file'} cannot be written" in message


def test_output_in_a_folder_that_cannot_be_written(refused, text, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(tmp_path))
    assert f"{tmp_path} cannot be written" in refused(tiny(), "--calib", text)


def test_output_that_has_no_name(refused, text, tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "by name" in refused(tiny(), "--calib", text, output=".")
    assert "cannot be used" in refused(tiny(), "--calib", text, output="x" * 300)


def test_empty_output_folder_is_taken(tmp_path, tiny):
    (tmp_path / "out").mkdir()
    assert trifold_cli("compress", tiny(), "-r", "w8a16", "-o", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_foreign_partial_folder_is_left_alone(refused, text, tiny, tmp_path, fresh):
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    (tmp_path / "out.partial" / "journal" / "diary.txt").write_text("dear diary")
    assert "out.partial: holds something else" in refused(tiny(), "--calib", text, *fresh)


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_file_in_place_of_the_partial_folder_is_left_alone(refused, text, tiny, tmp_path, fresh):
    (tmp_path / "out.partial").write_text("dear diary")
    assert "out.partial: holds something else" in refused(tiny(), "--calib", text, *fresh)


@pytest.mark.parametrize("size", ["much", "0", "0.1", "-5GB", "5 XB"])
def test_impossible_shard_size(refused, text, tiny, size):
    assert f"--max-shard-size {size!r}" in refused(tiny(), "--calib", text, f"--max-shard-size={size}")


def test_json_file_that_could_not_be_written_later(refused, text, tiny, tmp_path):
    assert "--json" in refused(tiny(), "--calib", text, "--json", tmp_path / "absent" / "report.json")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((), "Missing argument 'MODEL'"),
        (("m", "-o", "out"), "Missing option '-r'"),
        (("m", "-r", "w8a16"), "Missing option '-o'"),
        (("m", "-r", "w8a16", "-o", "out", "--dtype", "int8"), "'int8' is not one of"),
        (("m", "-r", "w8a16", "-o", "out", "--batch-size", "0"), "--batch-size"),
        (("m", "-r", "w8a16", "-o", "out", "--quick"), "--quick"),
    ],
)
def test_usage(arguments, fact):
    code, stdout, stderr = trifold_cli("compress", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1 and fact in stderr


# -- the function --------------------------------------------------------------------------------------------


def test_live_model_that_is_none_or_has_no_head(tiny):
    for model in (None, torch.nn.Linear(3, 3)):
        with pytest.raises(trifold.core.errors.InputError, match="is not a transformers causal language model"):
            trifold.compress(model, "w8a16")
    with pytest.raises(trifold.core.errors.InputError, match="LlamaModel has no language-model head"):
        trifold.compress(make_model().model, "w8a16")


def test_live_model_that_is_quantised_or_not_finite(tiny):
    model = trifold.compress(make_model(), "w8a16", verbosity=-1)
    with pytest.raises(trifold.core.errors.InputError, match="already quantised"):
        trifold.compress(model, "w8a16")
    model = make_model()
    with torch.no_grad():
        model.get_parameter(LAYER)[0, 0] = torch.nan
    with pytest.raises(trifold.core.errors.CheckpointError, match=f"{LAYER} holds NaN"):
        trifold.compress(model, "w8a16")


def test_calibration_that_is_no_text(tiny):
    with pytest.raises(trifold.core.errors.CalibrationError, match="int is no text"):
        trifold.compress(tiny(), "w4a16-gptq", 5)
    with pytest.raises(trifold.core.errors.CalibrationError, match="no sample has 2 tokens"):
        trifold.compress(tiny(), "w4a16-gptq", [])


def test_unknown_option_of_the_function(tiny):
    with pytest.raises(trifold.core.errors.InputError, match="unknown option 'shard'; known: batch_size"):
        trifold.compress(tiny(), "w8a16", shard=3)
    with pytest.raises(trifold.core.errors.RecipeError, match="not NoneType"):
        trifold.compress(tiny(), None)
