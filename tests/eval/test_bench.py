import json

import pytest
import torch

from tests.helpers import make_model, trifold_cli
from trifold.core.errors import InputError
from trifold.eval import bench, plot_speeds


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_one_row_for_each_batch_size(model):
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    rows = bench(model, (1, 3), prompt_tokens=5, new_tokens=4, repeats=2)
    hook.remove()
    assert [row.batch_size for row in rows] == [1, 3]
    for row in rows:
        assert row.prefill_tokens_per_s == pytest.approx(row.batch_size * 5 / row.time_to_first_token_s)
        assert row.decode_tokens_per_s > 0 and (row.peak_bytes is None or row.peak_bytes > 0)
    warm, run = [(1, 5)] + [(1, 1)] * 2, [(1, 5)] + [(1, 1)] * 4
    assert seen[: len(seen) // 2] == warm + run * 2
    assert seen[len(seen) // 2 :] == [(3, length) for _, length in warm + run * 2]


@pytest.mark.parametrize("settings", [{"batch_sizes": (0,)}, {"prompt_tokens": 0}, {"repeats": 0}, {"new_tokens": 400}])
def test_impossible_sizes(model, settings):
    with pytest.raises(InputError):
        bench(model, **{"batch_sizes": (1,), "prompt_tokens": 4, "new_tokens": 2, **settings})


def test_command_with_baseline_and_plot(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    other = tiny("qwen3", torch.float32)
    arguments = ("bench", tiny(), "--baseline", other, "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)
    sizes = ("--batch-size", 1, "--batch-size", 2)
    code, out, err = trifold_cli(*arguments, *sizes, "--json", "-", "--plot", tmp_path / "speeds.png")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["models"]) == sorted([str(tiny()), str(other)])
    assert all([s["batch_size"] for s in entry["speeds"]] == [1, 2] for entry in found["models"].values())
    weights = sum(p.nbytes for p in make_model().parameters())
    assert weights <= found["models"][str(tiny())]["weight_bytes"] <= weights + 4096  # rotary frequencies
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = trifold_cli(*arguments, "--batch-size", 1)
    assert code == 0 and out.count("x)") == 2, err


def test_a_plot_that_cannot_be_written(model, tmp_path):
    pytest.importorskip("matplotlib")
    rows = bench(model, (1,), prompt_tokens=2, new_tokens=1, repeats=1)
    with pytest.raises(InputError, match="cannot be written"):
        plot_speeds({"model": rows}, tmp_path / "plot.unknown")
