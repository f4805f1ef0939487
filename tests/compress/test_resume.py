"""A run that is broken off goes on when the same command is repeated, to the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import contents, trifold_cli, write_text
from trifold.compress import checkpoint, folder, journal, pipeline
from trifold.compress.folder import FolderSource
from trifold.formats import FORMATS

RECIPE = ("-r", "w3a16-awq-gptq", "--set", "group_size=32", "--nsamples", "8", "--seqlen", "32")


def command(model, text, output, *more):
    return ("compress", model, *RECIPE, "-o", output, "--calib", text, *more)


def result(output):
    """What must not depend on how the run went."""
    return {name: data for name, data in contents(output).items() if name != "report.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """The files of a run that nothing disturbed, in several shards."""
    folder = tmp_path_factory.mktemp("whole")
    text = write_text(folder / "calib.jsonl")
    code, _, stderr = trifold_cli(*command(tiny(), text, folder / "out", "--max-shard-size", "20KB"))
    assert code == 0, stderr
    assert len(list((folder / "out").glob("*.safetensors"))) > 2
    return result(folder / "out")


@pytest.fixture
def arguments(tmp_path, tiny, text):
    return command(tiny(), text, tmp_path / "out", "--max-shard-size", "20KB")


def break_off(monkeypatch, owner, name, call, error, after=False):
    """Raise `error` in the `call`-th call of owner.name, before it does anything or after."""
    original, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and not after:
            raise error
        value = original(*args, **kwargs)
        if len(calls) == call:
            raise error
        return value

    monkeypatch.setattr(owner, name, broken)


def half_removed(self):
    next(self.folder.glob("hidden-*")).unlink()
    raise KeyboardInterrupt


MOMENTS = {
    "before the journal is begun": (journal, "write_synced", 1, False),
    "before the first block": (journal.Journal, "write_block", 1, False),
    "between a block's files": (journal, "save_synced", 3, True),
    "after the first block": (journal.Journal, "write_block", 1, True),
    "after the second block": (journal.Journal, "write_block", 2, True),
    "after the last block": (journal.Journal, "write_block", 3, True),
    "before the shards": (checkpoint, "write_shards", 1, False),
    "between the shards": (checkpoint, "write_entries", 2, True),
    "after the shards": (checkpoint, "write_shards", 1, True),
    "before the other files": (FolderSource, "copy_files", 1, False),
    "before config.json": (checkpoint, "write_config", 1, False),
    "before the proof": (pipeline, "prove", 1, False),
    "after the proof": (pipeline, "prove", 1, True),
    "before the report": (checkpoint, "write_report", 1, False),
    "after the report": (checkpoint, "write_report", 1, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_run_goes_on(monkeypatch, tmp_path, arguments, whole, moment):
    owner, name, call, after = MOMENTS[moment]
    break_off(monkeypatch, owner, name, call, KeyboardInterrupt(), after)
    code, stdout, stderr = trifold_cli(*arguments)
    assert (code, stdout) == (130, "")
    assert stderr.splitlines()[-1] == f"interrupted; to go on, repeat: trifold {' '.join(map(str, arguments))}"
    assert (tmp_path / "out.partial" / "journal").is_dir() and not (tmp_path / "out").exists()
    monkeypatch.undo()
    blocks = len(list((tmp_path / "out.partial" / "journal").glob("block-*.json")))
    code, _, stderr = trifold_cli(*arguments)
    assert code == 0, stderr
    finished = moment == "after the report"  # then only the rename is missing
    assert ("going on after" in stderr) is (blocks > 0 and not finished)
    assert ("finished before" in stderr) is finished
    assert result(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def test_interrupted_while_the_journal_is_removed(monkeypatch, tmp_path, arguments, whole):
    monkeypatch.setattr(journal.Journal, "remove", half_removed)
    assert trifold_cli(*arguments)[0] == 130
    monkeypatch.undo()
    assert trifold_cli(*arguments)[0] == 0
    assert result(tmp_path / "out") == whole


def test_interrupted_again_and_again(monkeypatch, tmp_path, arguments, whole):
    for moment in ("after the first block", "after the first block", "between the shards", "before the proof"):
        owner, name, call, after = MOMENTS[moment]
        break_off(monkeypatch, owner, name, call, KeyboardInterrupt(), after)
        assert trifold_cli(*arguments)[0] == 130
        monkeypatch.undo()
    assert trifold_cli(*arguments)[0] == 0
    assert result(tmp_path / "out") == whole


@pytest.mark.parametrize("recipe", ["w3a16-awq-gptaq", "w8a8"])
def test_dense_stream_and_random_tokens_go_on_too(monkeypatch, tmp_path, tiny, text, recipe):
    """A recipe that follows the dense model keeps a second stream; one without text draws its tokens by seed."""
    calib = () if recipe == "w8a8" else ("--calib", text)
    arguments = ("compress", tiny("gpt2"), "-r", recipe, *RECIPE[4:], *calib, "-o")
    break_off(monkeypatch, journal.Journal, "write_block", 2, KeyboardInterrupt(), after=True)
    assert trifold_cli(*arguments, tmp_path / "out")[0] == 130
    monkeypatch.undo()
    assert trifold_cli(*arguments, tmp_path / "out")[0] == 0
    assert trifold_cli(*arguments, tmp_path / "whole")[0] == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_the_command_to_repeat_is_quoted(monkeypatch, tmp_path, tiny, text):
    break_off(monkeypatch, journal.Journal, "write_block", 1, KeyboardInterrupt())
    settings = ("--set", "ignore=['*q_proj', '*k_proj']")
    stderr = trifold_cli(*command(tiny(), text, tmp_path / "my model"), *settings)[2]
    assert f"'{tmp_path / 'my model'}'" in stderr
    assert """--set 'ignore=['"'"'*q_proj'"'"', '"'"'*k_proj'"'"']'""" in stderr


def test_rubbish_of_a_killed_writer_is_not_published(monkeypatch, tmp_path, arguments, whole):
    """safetensors writes into a file `.tmp...` beside the real one."""
    break_off(monkeypatch, checkpoint, "write_shards", 1, KeyboardInterrupt())
    assert trifold_cli(*arguments)[0] == 130
    monkeypatch.undo()
    for name in (".tmpAbCdEf", "shard-00000.safetensors.tmp", "model-00009-of-00009.safetensors", "config.json.tmp"):
        (tmp_path / "out.partial" / name).write_bytes(b"half")
    assert trifold_cli(*arguments)[0] == 0
    assert result(tmp_path / "out") == whole


KILLED = """
import sys, time
from trifold.cli import main
from trifold.compress import checkpoint, journal, pipeline

def slow(owner, name):
    original = getattr(owner, name)
    def slowed(*args, **kwargs):
        time.sleep(1)
        return original(*args, **kwargs)
    setattr(owner, name, slowed)

for owner, name in ((journal.Journal, "write_block"), (checkpoint, "write_entries"), (pipeline, "prove")):
    slow(owner, name)
main(sys.argv[1:])
"""


def test_killed_run_goes_on(tmp_path, arguments, whole):
    """SIGKILL after a block, between the shards and in the proof; each run takes up what the one before left."""
    partial = tmp_path / "out.partial"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the thread count is part of the fingerprint
    for pattern in ("journal/block-00001.json", "shard-00000.safetensors", "config.json"):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not (partial / pattern).exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    code, _, stderr = trifold_cli(*arguments)
    assert code == 0 and "going on after block 3 of 3" in stderr
    assert result(tmp_path / "out") == whole


# -- another run ---------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(monkeypatch, tmp_path, arguments):
    """The partial folder of a run broken off after its second block."""
    break_off(monkeypatch, journal.Journal, "write_block", 2, KeyboardInterrupt(), after=True)
    assert trifold_cli(*arguments)[0] == 130
    monkeypatch.undo()
    return tmp_path / "out.partial"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("--seed", "1"), "recipe.seed=0 (now 1)"),
        (("--set", "bits=4"), "scheme.bits=3 (now 4)"),
        (("--set", "gptq.act_order=false"), "options.act_order=True (now False)"),
        (("--nsamples", "7"), "recipe.nsamples=8 (now 7)"),
        (("--dtype", "bfloat16"), "dtype='float32' (now 'bfloat16')"),
        (("--max-shard-size", "1GB"), "max_shard_size='20KB' (now '1GB')"),
        (("--batch-size", "2"), "batch_size="),
    ],
)
def test_a_changed_run_is_refused_and_the_other_one_kept(unfinished, arguments, change, difference):
    before = contents(unfinished)
    code, stdout, stderr = trifold_cli(*arguments, *change)
    assert (code, stdout) == (2, "")
    message = stderr.splitlines()[-1]
    assert message.startswith("error: ") and difference in message and "--fresh starts over" in message
    assert contents(unfinished) == before


def test_changed_text_or_model_is_refused(unfinished, tmp_path, arguments, tiny):
    before = contents(unfinished)
    other = write_text(tmp_path / "other.jsonl", seed=4)
    code, _, stderr = trifold_cli(*arguments, "--calib", other)
    assert code == 2 and "calibration='" in stderr
    model = tiny("llama", rope_theta=5000.0)
    code, _, stderr = trifold_cli(*("compress", model, *arguments[2:]))
    assert code == 2 and "source.model" in stderr
    assert contents(unfinished) == before


def test_fresh_starts_over(unfinished, tmp_path, arguments, whole):
    code, _, stderr = trifold_cli(*arguments, "--fresh")
    assert code == 0 and "going on" not in stderr
    assert result(tmp_path / "out") == whole


def test_fresh_gives_the_changed_run(unfinished, tmp_path, arguments, tiny, text):
    assert trifold_cli(*arguments, "--seed", "1", "--set", "bits=4", "--fresh")[0] == 0
    other = (tmp_path / "other", "--seed", "1", "--set", "bits=4", "--max-shard-size", "20KB")
    assert trifold_cli(*command(tiny(), text, *other))[0] == 0
    assert result(tmp_path / "out") == result(tmp_path / "other")


# -- damage and a failing disk -------------------------------------------------------------------------------


def flipped(data, place):
    changed = bytearray(data)
    changed[place] ^= 4
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("fingerprint.json", b'{"recipe'),
        ("block-00000.json", b""),
        ("block-00001.json", b"\x00" * 50),
        ("block-00000.safetensors", b"half"),
        ("hidden-00002.safetensors", b""),
        ("reference-00001.safetensors", b"half"),
        ("hidden-00002.safetensors", None),
    ],
)
def test_damaged_journal(unfinished, tmp_path, arguments, whole, name, data):
    path = unfinished / "journal" / name
    path.write_bytes(flipped(path.read_bytes(), -3) if data is None else data)
    code, stdout, stderr = trifold_cli(*arguments)
    assert (code, stdout) == (4, "")
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in stderr
    assert f"{name}: damaged" in errors[0] and "--fresh starts over" in errors[0]
    assert unfinished.is_dir() and not (tmp_path / "out").exists()
    assert trifold_cli(*arguments, "--fresh")[0] == 0
    assert result(tmp_path / "out") == whole


def test_a_journal_without_some_of_its_files(unfinished, tmp_path, arguments, whole):
    (unfinished / "journal" / "reference-00001.safetensors").unlink()
    (unfinished / "journal" / "fingerprint.json").unlink()
    assert trifold_cli(*arguments)[0] == 0
    assert result(tmp_path / "out") == whole


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [(os, "fsync", no_space), (journal, "write_tensors", no_space), (os, "replace", no_space)],
)
@pytest.mark.parametrize("call", [2, 7, 9])
def test_full_disk(monkeypatch, tmp_path, arguments, whole, owner, name, failure, call):
    original, calls = getattr(owner, name), []

    def limited(*args, **kwargs):
        calls.append(None)
        return failure() if len(calls) >= call else original(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    code, stdout, stderr = trifold_cli(*arguments)
    monkeypatch.undo()
    assert (code, stdout) == (4, "")
    assert "Traceback" not in stderr and "interrupted" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device; make room, then run the same command" in last
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    assert trifold_cli(*arguments)[0] == 0
    assert result(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        PermissionError(errno.EACCES, "Permission denied", "shard"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failing_machine(monkeypatch, tmp_path, arguments, error):
    break_off(monkeypatch, journal.Journal, "write_block", 2, error)
    code, _, stderr = trifold_cli(*arguments)
    assert code == 4
    assert stderr.splitlines()[-1].startswith("error: ") and "run the same command" in stderr
    assert (tmp_path / "out.partial" / "journal" / "block-00000.json").exists()


def test_a_shard_that_cannot_be_read_any_more(monkeypatch, tmp_path, arguments, whole, tiny):
    """A disk that goes away between two blocks and comes back."""
    source = contents(tiny())
    original = folder.safe_open

    def gone(file, **options):
        if (tmp_path / "out.partial" / "journal" / "block-00000.json").exists():
            raise OSError(errno.EIO, "Input/output error", str(file))
        return original(file, **options)

    monkeypatch.setattr(folder, "safe_open", gone)
    code, _, stderr = trifold_cli(*arguments)
    last = stderr.splitlines()[-1]
    assert code == 4 and "model.safetensors: cannot be read any more (" in last and "run the same command" in last
    monkeypatch.undo()
    assert contents(tiny()) == source
    code, _, stderr = trifold_cli(*arguments)
    assert code == 0 and "going on after block 1" in stderr
    assert result(tmp_path / "out") == whole


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, arguments):
    break_off(monkeypatch, journal.Journal, "write_block", 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        from trifold.cli.main import cli

        cli.main(list(map(str, arguments)), standalone_mode=False)


# -- a failed proof ------------------------------------------------------------------------------------------


def assert_proof_fails(tmp_path, arguments, fact):
    code, stdout, stderr = trifold_cli(*arguments)
    assert (code, stdout) == (3, "")
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ") and fact in last, last
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("key", "fact"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj: the stored weight is not"),
        ("model.layers.2.self_attn.o_proj.weight_scale", "model.layers.2.self_attn.o_proj: the stored weight"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1: hidden states from disk differ"),
        ("model.norm.weight", "logits from disk differ"),
    ],
)
def test_damage_on_the_way_to_disk_fails_the_proof(monkeypatch, tmp_path, arguments, key, fact):
    def damage(folder, *_):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = load_file(folder / index[key])
        tensors[key] = tensors[key] * 2 + 1
        save_file(tensors, folder / index[key], metadata={"format": "pt"})
        original(folder, *_)

    original = checkpoint.write_config
    monkeypatch.setattr(checkpoint, "write_config", damage)
    assert_proof_fails(tmp_path, arguments, fact)


def test_tensor_lost_on_the_way_to_disk_fails_the_proof(monkeypatch, tmp_path, arguments):
    key = "model.layers.0.mlp.down_proj.weight_zero_point"
    original = checkpoint.write_shards

    def lossy(folder, units, size):
        original(folder, ({k: v for k, v in unit.items() if k != key} for unit in units), size)

    monkeypatch.setattr(checkpoint, "write_shards", lossy)
    assert_proof_fails(tmp_path, arguments, f"{key} was not written")


def test_format_that_does_not_unpack_what_it_packed_fails_the_proof(monkeypatch, tmp_path, arguments):
    fmt = FORMATS.get("int")
    original = type(fmt).unpack

    def wrong(self, tensors, spec):
        found = original(self, tensors, spec)
        return type(found)(found.codes ^ 1, found.scale, found.zero_point, found.scheme)

    monkeypatch.setattr(type(fmt), "unpack", wrong)
    assert_proof_fails(tmp_path, arguments, "model.layers.0.")
