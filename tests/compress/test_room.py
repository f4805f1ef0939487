"""What cannot fit is refused before anything is written, with the way out; one run at a time writes one folder."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import trifold
from tests.compress.test_estimate import CONFIGS
from tests.helpers import trifold_cli
from trifold.compress import estimate, forecast
from trifold.compress.estimate import estimate_model
from trifold.compress.job import Options
from trifold.compress.recipe import Recipe
from trifold.core.errors import InputError

LLAMA_8B = CONFIGS[8_030_261_248] | {"torch_dtype": "bfloat16", "max_position_embeddings": 8192}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


def peak(config, recipe="w4a16-gptq", options=None, settings=()):
    found = estimate_model(config, Recipe.load(recipe).updated(settings), options=options or Options())
    return max(found.memory.values())


def test_memory_of_an_8b_model_by_hand(config):
    """A block has 218 M weights of 2 bytes; 128 x 2048 tokens of 4096 features take 2.1 GB; down_proj's Gram in float64
    1.6 GB, and two more for its factors."""
    needed = peak(config)
    assert 6e9 < needed < 10e9
    assert 1.5e9 < needed - peak(config, options=Options(offload_activations=True)) < 5e9
    few = peak(config, settings=["nsamples=8"])
    assert few < needed - 2e9
    assert peak(config, "w4a16-rtn") < 4e9 < few
    assert peak(config, "w3a16-awq-gptaq") > needed
    assert peak(config, options=Options(offload_activations=True, stats_memory="1MB")) <= peak(
        config, options=Options(offload_activations=True)
    )


def test_memory_of_a_gpu_is_told_apart(config):
    found = estimate_model(config, Recipe.load("w4a16-gptq"), options=Options(device="cuda"))
    assert max(found.device_memory.values()) > 5e9 and max(found.memory.values()) < 3e9


def test_stages_follow_the_recipe(config):
    assert "rewrite" in estimate_model(config, Recipe.load("w4a16-awq")).memory
    assert "rewrite" not in estimate_model(config, Recipe.load("w4a16-gptq")).memory


def test_measured_time_grows_with_the_model(tiny):
    one, three = (
        estimate_model(tiny("llama", num_hidden_layers=n), Recipe.load("w4a16-gptq"), measure=True).seconds
        for n in (1, 30)
    )
    assert set(one) == {"forward", "statistics", "solve", "total"}
    assert all(seconds > 0 for seconds in one.values())
    assert three["total"] > one["total"]
    assert estimate_model(tiny(), Recipe.load("w4a16-rtn"), measure=True).seconds["statistics"] == 0


def test_what_does_not_fit_is_refused_with_the_way_out(tiny, tmp_path, text, monkeypatch):
    arguments = ("compress", tiny(), "-r", "w4a16-gptq", "-o", tmp_path / "out", "--calib", text)
    monkeypatch.setattr(estimate, "available_bytes", lambda: 10**7)
    code, _, stderr = trifold_cli(*arguments, "--nsamples", 2, "--seqlen", 32)
    assert code == 4 and "of memory (stage " in stderr and "10.0 MB are free" in stderr
    assert "still needs" in stderr and not (tmp_path / "out.partial").exists()
    monkeypatch.setattr(estimate, "available_bytes", lambda: None)  # a system that does not tell
    assert trifold_cli(*arguments, "--nsamples", 2, "--seqlen", 32)[0] == 0


def test_the_setting_that_would_fit_is_named():
    full = forecast.Forecast({"solve": 8 * 10**9}, {}, {})

    def needed(**changes):
        return replace(full, memory={"solve": 10**9 * (3 if changes.get("offload_activations") else 8)})

    with pytest.raises(forecast.ResourceError, match=r"8.00 GB .*; with --offload-activations it needs 3.00 GB"):
        forecast.check_memory("m", needed, 4 * 10**9)
    forecast.check_memory("m", needed, 9 * 10**9)
    with pytest.raises(forecast.ResourceError, match="still needs"):
        forecast.check_memory("m", needed, 10**9)


def test_a_disk_that_is_too_small(tiny, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: usage)
    code, _, stderr = trifold_cli("compress", tiny(), "-r", "w4a16-rtn", "-o", tmp_path / "new" / "out")
    assert code == 4 and "of disk there, and 0.0 MB are free; make room" in stderr
    assert not (tmp_path / "new").exists()


def test_two_runs_on_one_folder(tiny, tmp_path):
    output = tmp_path / "out"
    hold = (
        "import sys, pathlib\nfrom trifold.compress.checkpoint import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        code, _, stderr = trifold_cli("compress", tiny(), "-r", "w4a16-rtn", "-o", output)
        assert code == InputError.exit_code and f"another run (process {other.pid}) is writing it" in stderr
        assert not (tmp_path / "out.partial").exists()
        other.kill()
    assert (tmp_path / ".out.lock").exists()  # left behind, and nobody's
    trifold.compress(tiny(), "w4a16-rtn", None, output, verbosity=-1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
