"""Memory is bounded in several ways, none of which changes a byte of what is written."""

import mmap
import os
import sys

import pytest
import torch

from tests.helpers import contents, trifold_cli
from trifold.compress import scratch
from trifold.compress.memory import Room
from trifold.compress.scratch import Slab, mapped, spill
from trifold.core.errors import InputError
from trifold.core.method import Statistics
from trifold.core.statistics import Drift, Gram, Observation, Sample

RECIPES = {
    "w4a16-gptq": ("llama", ()),
    "w3a16-awq-gptaq": ("gpt2", ()),
    "w4a16-awq-gptq": ("qwen3_moe", ("--set", "min_expert_tokens=8")),
    "s50-wanda": ("llama", ()),
}


def run(tiny, text, output, recipe, *more):
    family, settings = RECIPES[recipe]
    calib = ("--calib", text, "--nsamples", 8, "--seqlen", 32, "--batch-size", 2)
    code, _, stderr = trifold_cli("compress", tiny(family), "-r", recipe, "-o", output, *calib, *settings, *more)
    assert code == 0, stderr
    return {name: data for name, data in contents(output).items() if name != "report.json"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_do_not_depend_on_memory(tmp_path, tiny, text, recipe, monkeypatch):
    monkeypatch.setattr(scratch, "_WORTH_A_FILE", 1)
    asked = []
    original = scratch.mapped
    monkeypatch.setattr(scratch, "mapped", lambda *a: asked.append(a[0]) or original(*a))
    plain = run(tiny, text, tmp_path / "plain", recipe)
    assert not asked
    assert run(tiny, text, tmp_path / "less", recipe, "--offload-activations", "--stats-memory", 20000) == plain
    assert asked


def test_statistics_of_a_pass_obey_their_bound(tmp_path, tiny, text, monkeypatch):
    """Every Gram of a block at once without a bound, no two with one that holds the widest alone."""
    alive, most = set(), {}

    def follow(limit):
        original = Gram.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            alive.add(id(self))
            most[limit] = max(most.get(limit, 0), sum(i in alive for i in list(alive)))

        monkeypatch.setattr(Gram, "__init__", init)
        monkeypatch.setattr(scratch, "_WORTH_A_FILE", 1)

        def gone(statistics, folder):
            spill(statistics, folder)
            alive.difference_update(id(s) for s in statistics)

        monkeypatch.setattr(sys.modules["trifold.compress.block"], "spill", gone)

    for limit in ("1GB", str(8 * 86**2)):
        alive.clear()
        follow(limit)
        settings = ("--set", "true_sequential=false", "--stats-memory", limit)
        run(tiny, text, tmp_path / limit, "w4a16-gptq", *settings)
        monkeypatch.undo()
    assert most["1GB"] >= 4
    assert most[str(8 * 86**2)] < most["1GB"]


def test_a_slab_in_a_file_leaves_memory_and_keeps_its_values(tmp_path):
    parts = [torch.randn(3, 5000, dtype=torch.bfloat16), torch.randn(2, 5000, dtype=torch.bfloat16)]
    slab = Slab(25_000, torch.bfloat16, "cpu", tmp_path)
    for part in parts:
        slab.add(part)
    assert not list(tmp_path.iterdir())  # the file has no name
    slab.parts[1].add_(1)
    slab.release(slab.parts[1])
    assert torch.equal(slab.parts[0], parts[0]) and torch.equal(slab.parts[1], parts[1] + 1)
    slab.add(torch.ones(1, dtype=torch.bfloat16))  # does not fit any more
    slab.add(torch.ones(1))
    assert slab.parts[2].dtype == torch.bfloat16 and slab.parts[3].dtype == torch.float32
    slab.release(slab.parts[3])


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED") or not os.path.exists("/proc/self/smaps"), reason="Linux")
def test_pages_that_are_released_are_not_resident(tmp_path):
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE

    slab = Slab(2**28, torch.uint8, "cpu", tmp_path)
    before = resident()
    slab.add(torch.ones(2**27, dtype=torch.uint8))  # larger than what the heap keeps
    assert resident() - before < 2**26
    assert slab.parts[0].sum() == 2**27
    assert resident() - before > 2**26


def test_spilled_statistics_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_WORTH_A_FILE", 1)
    x = torch.randn(40, 7)
    plain, moved = (Statistics((Gram, Drift, Sample), 7) for _ in range(2))
    for rows in (x[:13], x[13:]):
        for statistics in (plain, moved):
            for statistic in statistics:
                statistic.update(Observation(rows, rows + 1))
        spill(moved, tmp_path)
    assert torch.equal(plain.gram, moved.gram) and torch.equal(plain.drift, moved.drift)
    assert torch.equal(plain.sample, moved.sample)


def test_a_full_disk_is_an_error_before_anything_is_lost(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        mapped((1000,), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_size_that_is_none(tiny, tmp_path, text):
    code, _, stderr = trifold_cli(
        "compress", tiny(), "-r", "w4a16-gptq", "-o", tmp_path / "out", "--calib", text, "--stats-memory", "much"
    )
    assert code == InputError.exit_code and "--stats-memory 'much': write it as 5GB" in stderr


def test_room():
    assert Room(5).for_statistics() == 5 and Room().for_statistics() > 2**20
    assert Room(offload=True).remembered == 0 and Room().remembered is None
