"""Two processes on one compression: the same checkpoint but for the order of sums, and one message when one fails."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import trifold
from tests.helpers import contents, make_model, trifold_cli
from trifold.compress import pipeline
from trifold.compress.job import Options
from trifold.compress.preflight import prepare
from trifold.compress.processes import ALONE, Processes
from trifold.compress.progress import Reporter
from trifold.compress.recipe import Recipe
from trifold.core.canonical import stacked
from trifold.core.errors import CalibrationError, InputError
from trifold.core.method import METHODS, LayerProblem
from trifold.core.scheme import Scheme
from trifold.core.statistics import AbsMax, AbsMean, Drift, Gram, Mean, Observation, Sample

SIZES = ("--nsamples", "8", "--seqlen", "32", "--batch-size", "2")
FAILS = """
import os, sys
from trifold.cli import main
from trifold.compress import walk
from trifold.core.errors import ResourceError
original = walk.Walk.block
def block(self, index):
    if index == 1 and os.environ["RANK"] == "1":
        raise ResourceError("rank 1 has had enough")
    return original(self, index)
walk.Walk.block = block
main(sys.argv[1:])
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*command, size=2):
    """The processes as `torchrun` starts them, and what each wrote to stderr."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    found = [process.communicate(timeout=300) for process in running]
    return [process.returncode for process in running], [stderr for _, stderr in found]


def result(folder):
    return {name: data for name, data in contents(folder).items() if name != "report.json"}


def test_two_processes(tiny, tmp_path, text):
    """A mixture, its second block lost with one process and taken up again; then compared with a single process."""
    arguments = ("compress", tiny("qwen3_moe"), "-r", "w4a16-awq-gptq", "--calib", text, *SIZES)
    arguments += ("--set", "min_expert_tokens=4")
    codes, told = start("-c", FAILS, *arguments, "-o", tmp_path / "two")
    assert codes == [4, 4]
    errors = [line for line in "".join(told).splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1 has had enough"]
    codes, told = start("-m", "trifold", *arguments, "-o", tmp_path / "two")
    assert codes == [0, 0], told
    assert "going on after block 1 of 2" in told[0] and "block 2/2" in told[0] and "block" not in told[1]
    codes, told = start("-m", "trifold", *arguments, "-o", tmp_path / "again")
    assert codes == [0, 0], told
    assert result(tmp_path / "two") == result(tmp_path / "again")

    code, _, stderr = trifold_cli(*arguments, "-o", tmp_path / "one")
    assert code == 0, stderr
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    same = total = 0
    for name in (name for name in one if ".layers.0." in name and one[name].dtype == torch.int32):
        nibbles = [
            t.view(torch.uint8)[..., None] >> torch.tensor([0, 4], dtype=torch.uint8) & 15
            for t in (one[name], two[name])
        ]
        same, total = same + int((nibbles[0] == nibbles[1]).sum()), total + nibbles[0].numel()
    assert total > 10_000 and same > 0.999 * total


def test_rounding_does_not_depend_on_processes(tiny, tmp_path):
    """Without text there is one batch, for the proof, which every process runs."""
    arguments = ("compress", tiny(), "-r", "w4a16-rtn")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "trifold")
    codes, told = start(*launcher, *arguments, "-o", tmp_path / "two", size=1)
    assert codes == [0], told
    assert trifold_cli(*arguments, "-o", tmp_path / "one")[0] == 0
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys() and all(torch.equal(two[name], one[name]) for name in one)


def test_budgets_are_divided_by_all_processes_together(tiny, tmp_path, text):
    steps = [
        {"method": "modegpt", "targets": ["*mlp*"], "options": {"keep": 0.6}},
        {"method": "reduced_rank", "targets": ["*self_attn*"], "options": {"global_keep": 0.7, "multiple_of": 1}},
    ]
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": steps}))
    arguments = ("compress", tiny(num_hidden_layers=2), "-r", tmp_path / "recipe.json", "--calib", text, *SIZES)
    codes, told = start("-m", "trifold", *arguments, "-o", tmp_path / "two")
    assert codes == [0, 0], told
    assert trifold_cli(*arguments, "-o", tmp_path / "one")[0] == 0
    two, one = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("two", "one"))
    assert two["quantization_config"]["slices"] == one["quantization_config"]["slices"]
    two, one = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one"))
    assert two["bits_per_weight"] == pytest.approx(one["bits_per_weight"], rel=0.02)
    assert two["mean_error"] == pytest.approx(one["mean_error"], rel=0.1)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_more_processes_than_batches(tiny, text, rank):
    recipe = Recipe.load("w4a16-gptq").updated(["nsamples=4", "seqlen=32"])
    quiet = Reporter(-1)
    job = prepare(tiny(), recipe, text, Options(batch_size=2), quiet, None, Processes(rank % 2, 2))
    assert [len(ids) for ids in job.ids] == [2]
    with pytest.raises(CalibrationError, match="2 batches for 3 processes; start fewer"):
        prepare(tiny(), recipe, text, Options(batch_size=2), quiet, None, Processes(rank, 3))


def test_what_one_process_does_alone(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "join", lambda: Processes(0, 2))
    arguments = ("-o", tmp_path / "out", "--calib", text, *SIZES)
    code, _, stderr = trifold_cli("compress", tiny(), "-r", "w4-s50-gqsa-recovered", *arguments)
    assert code == 2 and "tunes in one process; start one" in stderr
    with pytest.raises(InputError, match="several processes compress a folder into a folder"):
        trifold.compress(make_model(), "w4a16-rtn", verbosity=-1)


@pytest.mark.parametrize("kind", [Gram, Drift, AbsMean, Mean, AbsMax, Sample])
def test_statistics_of_two_processes_are_those_of_one(kind, monkeypatch):
    """Against `merge`, with the second process's tensors where a collective would bring them from."""
    halves = [torch.randn(6, 5), torch.randn(9, 5)]
    mine, other, merged = kind(5), kind(5), kind(5)
    for statistic, x in ((mine, halves[0]), (other, halves[1]), (merged, halves[0])):
        statistic.update(Observation(x, x + 1))
    merged.merge(other)
    theirs = iter([getattr(other, name) for name in kind.shared] + [torch.tensor(other.tokens)])

    def reduced(self, tensor, how):
        second = next(theirs)
        return torch.maximum(tensor, second) if "MAX" in str(how) else tensor + second

    processes = Processes(0, 2)
    monkeypatch.setattr(Processes, "_reduced", reduced)
    monkeypatch.setattr(Processes, "same", lambda self, value, owner, *_: value if owner == 0 else next(theirs))
    processes.reduce([mine])
    assert mine.tokens == merged.tokens == 15
    for name in kind.shared:
        assert torch.equal(getattr(mine, name), getattr(merged, name))


@pytest.mark.parametrize("name", ["gptq", "gptaq"])
def test_rows_of_a_layer_are_decided_alone(name):
    """So processes can share them; a scale of the whole tensor is found from all rows."""
    torch.manual_seed(0)
    method, scheme, x = METHODS.get(name)(), Scheme(3, 16), torch.randn(300, 48) @ torch.randn(48, 48)
    weight, drift = torch.randn(70, 48), 0.01 * torch.randn(48, 48).double()
    assert (
        method.by_rows(scheme) and not method.by_rows(Scheme(3, "tensor")) and not METHODS.get("rtn")().by_rows(scheme)
    )

    def solved(rows):
        return method.solve(LayerProblem({"": rows}, {"": scheme}, (x.T @ x).double(), drift)).canonical[""]

    whole, joined = solved(weight), stacked([solved(rows) for rows in weight.tensor_split(3)])
    assert joined.shape == whole.shape and joined.scheme == whole.scheme
    assert (joined.codes == whole.codes).float().mean() > 0.999
    assert torch.allclose(joined.scale.float(), whole.scale.float(), rtol=1e-3)
    assert torch.equal(joined.zero_point, whole.zero_point)


def test_shares():
    assert Processes(0, 2).shares({"a": 1.0, "b": 5.0, "c": 4.0, "d": 2.0}) == [["b", "a"], ["c", "d"]]
    assert ALONE.shares({"a": 1.0, "b": 5.0}) == [["b", "a"]]
    assert ALONE.same("x") == "x"
