"""What engines run: each limit refused in one line with layer, reason and way out; the best format chosen."""

import json

import pytest
import torch

import trifold
from tests.helpers import contents, save_model, trifold_cli
from trifold.compress import pipeline
from trifold.core.canonical import Quantized, RoundedInput
from trifold.core.errors import InputError
from trifold.core.inputs import InputScheme
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.ecosystem import CODECS
from trifold.ecosystem.engines import ENGINES, check_layers, engine_refusal, runs

LAYER = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.3.down_proj"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def weight(rows=128, columns=256, bits=4, group=32, symmetric=True, inputs=None, **scheme):
    scheme = Scheme(bits, group, symmetric, "float16", **scheme)
    shape = scheme.scale_shape(rows, columns)
    zero = None if scheme.symmetric else torch.full(shape, 3, dtype=torch.uint8)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    found = Quantized(codes, torch.ones(shape, dtype=SCALE_DTYPES["float16"]), zero, scheme)
    return found if inputs is None else RoundedInput(found, inputs)


FP8 = {"bits": 8, "grid": "fp8_e4m3", "group": "channel"}
INT8, FLOAT8 = InputScheme(full_range=True), InputScheme(grid="fp8_e4m3")
RUN = [
    ("vllm", "pack-quantized", {"bits": 8, "group": "channel"}),
    ("vllm", "pack-quantized", {"symmetric": False}),
    ("vllm", "int-quantized", {"bits": 8, "group": "channel", "inputs": INT8}),
    ("vllm", "float-quantized", FP8),
    ("vllm", "float-quantized", {**FP8, "inputs": FLOAT8}),
    ("vllm", "awq", {"symmetric": False}),
    ("vllm", "pack-quantized", {"rows": 8, "columns": 32}),
    ("sglang", "gptq", {"group": 128}),
    ("transformers", "pack-quantized", {"bits": 3, "symmetric": False, "group": 2}),
    ("transformers", "int-quantized", {"bits": 8, "symmetric": False, "group": "channel", "inputs": INT8}),
    ("gptqmodel", "gptq_v2", {"bits": 3, "symmetric": False}),
]


@pytest.mark.parametrize(("engine", "codec", "case"), RUN, ids=str)
def test_what_an_engine_runs(engine, codec, case):
    assert engine_refusal(ENGINES[engine], LAYER, CODECS.get(codec), weight(**case)) is None


REFUSED = [
    ("vllm", "pack-quantized", {"bits": 3}, "it has 3 bits; compress with bits=4 or 8"),
    ("vllm", "pack-quantized", {"group": 16}, "its group_size is 16; compress with group_size=32, 64, 128, channel"),
    ("vllm", "pack-quantized", {"bits": 8, "symmetric": False}, "8 bits have no zero-points there; .*symmetric=true"),
    ("vllm", "pack-quantized", {"inputs": INT8}, "its activations are rounded to integers; .* not rounded"),
    ("vllm", "int-quantized", {"bits": 8, "group": "channel"}, "activations are not rounded; .* rounded to integers"),
    ("vllm", "int-quantized", {"bits": 8, "inputs": INT8}, "its group_size is 32; compress with group_size=channel"),
    ("vllm", "gptq", {"symmetric": False}, "4 bits have no zero-points there"),
    ("vllm", "gptq_v2", {}, "does not load gptq_v2; --to compressed-tensors"),
    ("sglang", "pack-quantized", {"rows": 72}, "its 72 outputs are no multiple of 64; leave it dense"),
    ("sglang", "pack-quantized", {"columns": 192}, "its 192 inputs are no multiple of 128; leave it dense"),
    ("gptqmodel", "gptq", {"group": 8}, "its group_size is 8; compress with group_size=16, 32"),
    ("gptqmodel", "pack-quantized", {}, "does not load pack-quantized; --to gptq"),
    ("llama.cpp", "awq", {}, "does not load awq; --to gguf"),
]


@pytest.mark.parametrize(("engine", "codec", "case", "reason"), REFUSED, ids=str)
def test_what_it_does_not_run_and_what_to_do(engine, codec, case, reason):
    layers = {LAYER: (CODECS.get(codec), {}, weight(**case))}
    with pytest.raises(InputError, match=f"^{LAYER}: {engine} .*{reason}"):
        check_layers(ENGINES[engine], layers, frozenset())
    assert not runs(ENGINES[engine], layers, frozenset())


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_experts_have_no_zero_points(engine):
    codec, case = CODECS.get("pack-quantized"), weight(symmetric=False)
    assert engine_refusal(ENGINES[engine], LAYER, codec, case) is None
    assert "zero-points there; compress with symmetric=true" in engine_refusal(ENGINES[engine], EXPERT, codec, case)


def kinds(**cases):
    codec = CODECS.get("pack-quantized")
    made = {f"m.0.{name}": weight(**case) for name, case in cases.items()}
    return {name: (codec, codec.settings(each), each) for name, each in made.items()}


def test_layers_that_are_joined_share_a_scheme():
    vllm, dense = ENGINES["vllm"], frozenset(["m.0.down_proj", "m.1.k_proj", "m.1.q_proj"])
    assert check_layers(vllm, kinds(q_proj={}, k_proj={}, v_proj={}, up_proj={"bits": 8}), dense) == []
    with pytest.raises(InputError, match=r"m.0.v_proj: vllm joins it with m.0.q_proj, and it is int8 g32.*int4 g32"):
        check_layers(vllm, kinds(q_proj={}, k_proj={}, v_proj={"bits": 8}), dense)
    with pytest.raises(InputError, match=r"m.0.gate_proj: vllm joins it with m.0.up_proj, and it is dense"):
        check_layers(vllm, kinds(up_proj={}), frozenset(["m.0.gate_proj"]))
    with pytest.raises(InputError, match=r"experts.1.w2: vllm joins it with m.0.experts.0.w1"):
        check_layers(vllm, kinds(**{"experts.0.w1": {}, "experts.1.w2": {"bits": 8}}), dense)
    assert check_layers(ENGINES["transformers"], kinds(q_proj={}, k_proj={"bits": 8}), dense) == []


def test_sglang_takes_one_scheme_beside_experts():
    mixed = kinds(o_proj={"bits": 8}, **{"experts.0.w1": {}})
    assert check_layers(ENGINES["vllm"], mixed, frozenset()) == []
    with pytest.raises(InputError, match=r"experts.0.w1: sglang wants one scheme for all layers of a mixture"):
        check_layers(ENGINES["sglang"], mixed, frozenset())


def test_notices_of_zero_points_and_of_another_rule_for_activations():
    transformers, codec = ENGINES["transformers"], CODECS.get("int-quantized")
    (notice,) = check_layers(transformers, kinds(q_proj={"symmetric": False}), frozenset())
    assert "dequantize=True" in notice
    for full, engine, other in ((False, "transformers", "true"), (True, "vllm", "false")):
        case = weight(bits=8, group="channel", inputs=InputScheme(full_range=full))
        layers = {LAYER: (codec, codec.settings(case), case)}
        (notice,) = check_layers(ENGINES[engine], layers, frozenset())
        assert f"input.full_range={other}" in notice
        fits = "vllm" if engine == "transformers" else "transformers"
        assert check_layers(ENGINES[fits], layers, frozenset()) == []


def recipe(bits=4, group_size=32, **rest):
    scheme = {"bits": bits, "group_size": group_size, "scale_dtype": "float16", "symmetric": True, **rest}
    return {"steps": [{"method": "rtn", "scheme": scheme}]}


@pytest.fixture(scope="module")
def fold(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    save_model(root / "dense", "llama", **SIZES)
    trifold.compress(root / "dense", recipe(), None, root / "out", verbosity=-1)
    return root / "out"


def test_the_best_format_for_an_engine(tmp_path, fold):
    for engine, best in (("vllm", "compressed-tensors"), ("gptqmodel", "gptq"), ("transformers", "compressed-tensors")):
        report = trifold.export(fold, None, tmp_path / engine, engine=engine)
        assert report["format"] == best and report["notices"] == []
    code, _, stderr = trifold_cli("export", fold, "--engine", "sglang", "-o", tmp_path / "no")
    assert code == 2 and "q_proj: sglang does not run it as pack-quantized: its 64 inputs are no multiple" in stderr
    trifold.export(fold, None, tmp_path / "again", engine="vllm", requantize=True)
    assert contents(tmp_path / "again") == contents(tmp_path / "vllm")


@pytest.mark.parametrize(
    ("to", "engine", "reason"),
    [
        (None, None, "give a format with --to, or an engine"),
        ("awq", "vlm", "unknown engine 'vlm'; did you mean vllm"),
        ("gguf", "vllm", "vllm does not load gguf; --to compressed-tensors"),
        ("dense", "llama.cpp", "llama.cpp does not load dense; --to gguf"),
    ],
)
def test_formats_and_engines_that_do_not_go_together(tmp_path, fold, to, engine, reason):
    with pytest.raises(InputError, match=reason):
        trifold.export(fold, to, tmp_path / "out", engine=engine)
    assert not list(tmp_path.iterdir())


def test_a_compression_exports_beside_itself(tmp_path, fold):
    dense = fold.parent / "dense"
    report = trifold.compress(dense, recipe(), None, tmp_path / "out", verbosity=-1, engine="vllm")
    assert report["export"]["output"] == str(tmp_path / "out-compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-compressed-tensors"]
    trifold.export(fold, None, tmp_path / "alone", engine="vllm")
    assert contents(tmp_path / "alone") == contents(tmp_path / "out-compressed-tensors")


UNFIT = [
    (recipe(3), {"export_to": "awq"}, "awq cannot hold it: it has 3 bits"),
    (recipe(3), {"engine": "vllm"}, "vllm does not run it as pack-quantized: it has 3 bits"),
    (recipe(symmetric=False), {"export_to": "gptq"}, "zero-point of 0"),
    (recipe(scale_dtype="float32"), {"export_to": "gptq_v2"}, "scales would be rounded to float16"),
    ("s50-wanda", {"export_to": "compressed-tensors"}, "not rounded to one grid"),
    ("w4a16-nf4", {"export_to": "gptq"}, "nf4, not integers"),
    ("w8a8", {"export_to": "awq"}, "it rounds activations"),
    (recipe(), {"export_to": "q4"}, "unknown export format"),
]


@pytest.mark.parametrize(("chosen", "options", "reason"), UNFIT, ids=str)
def test_a_recipe_that_the_format_cannot_hold_is_refused_before_anything_runs(
    tmp_path, text, fold, monkeypatch, chosen, options, reason
):
    monkeypatch.setattr(pipeline, "compress_to", lambda *_: pytest.fail("compressed"))
    calibration = text if isinstance(chosen, str) else None
    with pytest.raises(InputError, match=reason):
        trifold.compress(
            fold.parent / "dense", chosen, calibration, tmp_path / "out", nsamples=4, seqlen=16, verbosity=-1, **options
        )
    assert {path.name for path in tmp_path.iterdir()} <= {"calib.jsonl"}


def test_experts_are_known_before_they_are_compressed(tmp_path):
    save_model(tmp_path / "dense", "mixtral", **{**SIZES, "intermediate_size": 64})
    with pytest.raises(InputError, match=r"experts\.\d\.up: vllm does not run it.* experts of 4 bits have no zero"):
        trifold.compress(
            tmp_path / "dense",
            recipe(symmetric=False),
            None,
            tmp_path / "out",
            verbosity=-1,
            export_to="compressed-tensors",
            engine="vllm",
        )
    report = trifold.compress(tmp_path / "dense", recipe(), None, tmp_path / "out", verbosity=-1, engine="vllm")
    assert report["export"]["layers"] == {"pack-quantized": 24}
    with pytest.raises(InputError, match=r"dense.tokenizer.json: it is a WordLevel model"):
        trifold.compress(tmp_path / "dense", recipe(), None, tmp_path / "other", verbosity=-1, export_to="gguf")
    assert not (tmp_path / "other").exists()
    (tmp_path / "dense" / "tokenizer.json").unlink()
    report = trifold.compress(tmp_path / "dense", recipe(), None, tmp_path / "other", verbosity=-1, export_to="gguf")
    assert sum(report["export"]["layers"].values()) > 0 and (tmp_path / "other-gguf" / "model.gguf").exists()


def test_the_commands_of_both(tmp_path, fold):
    dense = fold.parent / "dense"
    options = ("-r", "w4a16-rtn", "--set", "group_size=16", "--engine", "vllm", "--dry-run")
    code, _, stderr = trifold_cli("compress", dense, "-o", tmp_path / "out", *options)
    assert code == 2 and "group_size is 16" in stderr and not list(tmp_path.iterdir())
    (tmp_path / "out-awq").write_text("taken")
    code, _, stderr = trifold_cli("compress", dense, "-o", tmp_path / "out", "-r", "w4a16-rtn", "--export-to", "awq")
    assert code == 2 and "out-awq: already exists" in stderr
    code, _, stderr = trifold_cli("export", fold, "-o", tmp_path / "x")
    assert code == 2 and "give a format with --to" in stderr


def test_what_a_killed_export_left_goes_and_what_is_not_ours_stays(tmp_path, fold):
    left = tmp_path / "out.partial"
    (left / ".export").mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    trifold.export(fold, "dense", tmp_path / "out")
    assert not left.exists() and not list((tmp_path / "out").glob(".*"))
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").write_text("keep")
    with pytest.raises(InputError, match=r"other\.partial: exists.*move it away"):
        trifold.export(fold, "dense", tmp_path / "other")
    assert (tmp_path / "other.partial" / "mine").read_text() == "keep"


def test_a_head_is_named_beside_the_class_of_linear_layers(tmp_path):
    save_model(tmp_path / "dense", "llama", **SIZES)
    chosen = recipe()
    chosen["steps"][0]["targets"] = ["blocks", "head"]
    trifold.compress(tmp_path / "dense", chosen, None, tmp_path / "out", verbosity=-1)
    trifold.export(tmp_path / "out", None, tmp_path / "vllm", engine="vllm")
    block = json.loads((tmp_path / "vllm" / "config.json").read_text())["quantization_config"]
    assert block["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"] and block["ignore"] == []
