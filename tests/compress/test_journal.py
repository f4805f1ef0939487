"""The files of a journal: nothing that a disk has changed is read again."""

import shutil

import pytest
import torch

from trifold.compress.compressed import Compressed
from trifold.compress.journal import Follower, Journal, reference
from trifold.compress.tensor_file import Entry, check_digest, stored, write_tensors
from trifold.core.errors import InputError, ResourceError

FINGERPRINT = {"recipe": {"seed": 0}, "versions": {"trifold": "1.0", 10: 1, 2: 1}}


def hidden(block):
    return [Entry.of(torch.full((2, 3), float(block)))]


def make(folder, blocks=2):
    journal = Journal(folder, FINGERPRINT)
    journal.note("allocation", {"layer": 0.25})
    for block in range(journal.done, blocks):
        tensors = {"a.codes": torch.arange(7, dtype=torch.uint8), "a.scale": torch.tensor([0.1 * block, 3.0])}
        journal.keep(reference(block), {"hidden": torch.ones(2, 3)})
        journal.write_block(block, Compressed(tensors, report={"a": {"error": 0.1}}), hidden(block), {"awq": [0.5]})
    return journal


def read(folder):
    """Everything that a run takes from a journal when it goes on."""
    journal = Journal(folder, FINGERPRINT)
    blocks = [{k: e.load() for k, e in journal.block_tensors(block).items()} for block in range(journal.done)]
    references = [journal.kept(reference(block))["hidden"] for block in range(journal.done)]
    entries = [journal.entry(block) for block in range(journal.done)]
    return journal.done, journal.noted("allocation"), entries, list(journal.hidden()), blocks, references


def test_what_was_kept_is_read(tmp_path):
    make(tmp_path / "journal")
    done, allocation, entries, (states,), blocks, references = read(tmp_path / "journal")
    assert (done, allocation) == (2, {"layer": 0.25})
    assert entries[1]["carries"] == {"awq": [0.5]} and entries[0]["report"] == {"a": {"error": 0.1}}
    assert torch.equal(states, torch.full((2, 3), 1.0))
    assert blocks[1]["a.scale"].tolist() == torch.tensor([0.1, 3.0]).tolist()
    assert len(references) == 2
    names = {path.name for path in (tmp_path / "journal").iterdir()}
    assert names == {
        *("fingerprint.json", "allocation.json", "hidden-00002.safetensors"),
        *(f"block-0000{i}.{kind}" for i in range(2) for kind in ("json", "safetensors")),
        *(f"reference-0000{i}.safetensors" for i in range(2)),
    }


def test_every_flipped_bit_is_found(tmp_path):
    """In any file, at any place: most are refused when the journal is opened, and the others when they are read."""
    make(tmp_path / "whole")
    generator = torch.Generator().manual_seed(0)
    for path in sorted((tmp_path / "whole").iterdir()):
        data = path.read_bytes()
        for place in torch.randint(0, 8 * len(data), (12,), generator=generator).tolist():
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            shutil.rmtree(tmp_path / "journal", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "journal")
            (tmp_path / "journal" / path.name).write_bytes(changed)
            with pytest.raises(ResourceError, match=f"{path.name}: damaged .* --fresh starts over"):
                read(tmp_path / "journal")


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"null", b"\xff\x00" * 40])
def test_rubbish(tmp_path, data):
    make(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").iterdir()):
        shutil.rmtree(tmp_path / "journal", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "journal")
        (tmp_path / "journal" / path.name).write_bytes(data)
        with pytest.raises(ResourceError, match=f"{path.name}: damaged"):
            read(tmp_path / "journal")


@pytest.mark.parametrize(
    ("name", "done"),
    [
        *[("fingerprint.json", 0), ("allocation.json", 2), ("block-00000.json", 0), ("block-00001.json", 0)],
        *[("block-00001.safetensors", 0), ("reference-00000.safetensors", 0), ("hidden-00002.safetensors", 0)],
    ],
)
def test_missing_files(tmp_path, name, done):
    """Blocks count up to the first hole, and only with the hidden states behind; the rest is redone."""
    make(tmp_path / "journal")
    (tmp_path / "journal" / name).unlink()
    assert Journal(tmp_path / "journal", FINGERPRINT).done == done
    assert make(tmp_path / "journal").done == 2
    assert read(tmp_path / "journal")[0] == 2


def test_a_changed_version_is_named(tmp_path):
    make(tmp_path / "journal")
    changed = FINGERPRINT | {"versions": {**FINGERPRINT["versions"], "trifold": "1.1"}}
    with pytest.raises(InputError, match=r"versions\.trifold='1\.0' \(now '1\.1'\); --fresh starts over"):
        Journal(tmp_path / "journal", changed)


def test_a_follower_keeps_its_share_with_a_checksum(tmp_path):
    follower = Follower(tmp_path, 1, 1)
    follower.write_block(0, hidden(0))
    assert next(follower.hidden()).tolist() == [[0.0] * 3] * 2
    path = tmp_path / "hidden-00001-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ResourceError, match="damaged"):
        list(follower.hidden())


def test_a_digest_does_not_change_what_a_file_holds(tmp_path):
    entries = {'odd "sha256":"name': Entry.of(torch.arange(5)), "empty": Entry.of(torch.empty(0, 2))}
    write_tensors(tmp_path / "plain", entries)
    write_tensors(tmp_path / "checked", entries, digest=True)
    check_digest(tmp_path / "checked")
    with pytest.raises(ValueError, match="checksum"):
        check_digest(tmp_path / "plain")
    plain, checked = stored(tmp_path / "plain"), stored(tmp_path / "checked")
    assert all(torch.equal(plain[name].load(), checked[name].load()) for name in entries)
