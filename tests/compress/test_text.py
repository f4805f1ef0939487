import hashlib
import struct
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, LlamaConfig, PreTrainedTokenizerFast

from trifold.compress.documents import read_documents
from trifold.compress.text import (
    batches,
    clamp_seqlen,
    windows_from_documents,
    windows_from_samples,
)
from trifold.core.errors import CalibrationError, InputError

LETTERS = "abcdefghij"  # ids 2..11; <unk> is 0, <s> is 1


def make_tokenizer(bos):
    vocab = {"<unk>": 0, "<s>": 1} | {letter: i + 2 for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>" if bos else None, model_max_length=8
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=True)


@pytest.fixture(scope="module")
def plain_tokenizer():
    return make_tokenizer(bos=False)


def as_lists(windows):
    return [window.tolist() for window in windows.ids]


def one_line(excinfo, *parts):
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- documents


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo é".encode())
    assert list(read_documents(path)) == ["one\n\ntwo é"]
    assert list(read_documents(str(path))) == ["one\n\ntwo é"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    assert list(read_documents("~/notes.txt")) == ["hello"]


def test_jsonl_gives_one_document_per_line_lazily(tmp_path):
    path = tmp_path / "data.JSONL"
    path.write_text('\ufeff{"text": "one\\ntwo"}\n\n{"text": "\u2028", "n": 1}\nbroken', encoding="utf-8")
    documents = iter(read_documents(path))
    assert [next(documents), next(documents)] == ["one\ntwo", "\u2028"]
    with pytest.raises(CalibrationError) as excinfo:
        next(documents)
    one_line(excinfo, f"{path}:4", "not a JSON object")


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', '["text"]', "null"])
def test_jsonl_line_without_text_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(CalibrationError) as excinfo:
        list(read_documents(path))
    one_line(excinfo, f"{path}:2", '"text"')


def test_undecodable_bytes_name_the_file(tmp_path):
    text_path, jsonl_path = tmp_path / "latin.txt", tmp_path / "latin.jsonl"
    text_path.write_bytes(b"abc\xff")
    jsonl_path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CalibrationError) as excinfo:
        read_documents(text_path)
    one_line(excinfo, str(text_path), "UTF-8", "byte 3")
    with pytest.raises(CalibrationError) as excinfo:
        list(read_documents(jsonl_path))
    one_line(excinfo, f"{jsonl_path}:2", "UTF-8")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_file(tmp_path, name):
    path = tmp_path / name
    path.touch()
    with pytest.raises(CalibrationError) as excinfo:
        read_documents(path, option="--text")
    one_line(excinfo, str(path), "empty", "--text FILE")


def test_blank_file(tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text(" \n\n")
    with pytest.raises(CalibrationError) as excinfo:
        read_documents(path)
    one_line(excinfo, str(path), "white space")


@pytest.mark.parametrize(
    "source",
    [
        "missing.txt",
        "./missing",
        "/nowhere/missing",
        "a/b/c",
        "~missing",
        "dir\\file",
        "data/missing.jsonl",
        "d/",
    ],
)
def test_missing_file(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would raise
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(CalibrationError) as excinfo:
        read_documents(source)
    one_line(excinfo, source, "no such file; ", "--calib FILE")


def test_folder_and_empty_name(tmp_path):
    with pytest.raises(CalibrationError) as excinfo:
        read_documents(tmp_path)
    one_line(excinfo, str(tmp_path), "folder")
    with pytest.raises(CalibrationError) as excinfo:
        read_documents("")
    one_line(excinfo, "empty", "--calib FILE")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
@pytest.mark.parametrize("source", ["wikitext:wikitext-2-raw-v1:test", "org/corpus"])
def test_dataset_offline_fails_at_once(source, variable, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError) as excinfo:
        read_documents(source, option="--text")
    one_line(excinfo, source, "no such file", variable, "--text FILE")


def test_malformed_dataset_name():
    for source in ["a:b:c:d", ":b"]:
        with pytest.raises(CalibrationError, match="name:config:split"):
            read_documents(source)


def online(monkeypatch, rows, calls):
    import datasets
    import huggingface_hub

    def load_dataset(*args, **options):
        calls.append((args, options))
        return rows

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_unreachable_network_fails_at_once(monkeypatch):
    import huggingface_hub

    def unreachable(name, timeout):
        assert timeout <= 10
        raise ConnectionError("Connection refused\nmore")

    online(monkeypatch, [], [])
    monkeypatch.setattr(huggingface_hub, "dataset_info", unreachable)
    with pytest.raises(CalibrationError) as excinfo:
        read_documents("c4:en")
    one_line(excinfo, "c4:en", "'c4'", "Connection refused", "--calib FILE")


@pytest.mark.parametrize(
    ("source", "name", "config", "split"),
    [
        ("corpus", "corpus", None, "train"),
        ("org/corpus-1.0:en", "org/corpus-1.0", "en", "train"),
        ("corpus:en:test", "corpus", "en", "test"),
        ("corpus::test", "corpus", None, "test"),
    ],
)
def test_dataset_name_config_split(monkeypatch, source, name, config, split):
    calls = []
    online(monkeypatch, [{"text": "a"}, {"text": "b"}], calls)
    assert list(read_documents(source)) == ["a", "b"]
    assert calls == [((name, config), {"split": split, "streaming": True})]


def test_lines_of_wikitext_are_one_document(monkeypatch):
    online(monkeypatch, [{"text": ""}, {"text": " = A = \n"}, {"text": " b \n"}], [])
    expected = ["\n\n = A = \n\n\n b \n"]
    assert list(read_documents("wikitext:wikitext-2-raw-v1:test")) == expected
    assert list(read_documents("Salesforce/wikitext:wikitext-2-raw-v1:test")) == expected


def test_dataset_without_text_column_and_broken_stream(monkeypatch):
    def broken():
        yield {"text": "a"}
        raise OSError("reset by peer")

    online(monkeypatch, [{"sentence": "a", "id": 0}], [])
    with pytest.raises(CalibrationError) as excinfo:
        list(read_documents("ptb"))
    one_line(excinfo, "ptb", "sentence, id")
    online(monkeypatch, broken(), [])
    documents = iter(read_documents("corpus"))
    assert next(documents) == "a"
    with pytest.raises(CalibrationError) as excinfo:
        next(documents)
    one_line(excinfo, "corpus", "reset by peer")


# --- windows from documents


def test_bos_precedes_every_document(tokenizer):
    windows = windows_from_documents(["a b c", "", "d e"], tokenizer, 3, 2, source="src")
    assert as_lists(windows) == [[1, 2, 3], [4, 1, 5]]
    assert windows.ids[0].dtype == torch.int64
    assert windows.bos == "<s> (id 1) before every document"
    assert (windows.source, windows.seqlen, windows.stride) == ("src", 3, 3)
    assert windows.total_tokens == 6
    assert windows.notices == ()


def test_without_bos_nothing_is_added(plain_tokenizer):
    windows = windows_from_documents(["a b c", "d e f"], plain_tokenizer, 3, None)
    assert as_lists(windows) == [[2, 3, 4], [5, 6, 7]]
    assert windows.bos.startswith("none")


def test_remainder_is_dropped_after_a_complete_window(plain_tokenizer):
    windows = windows_from_documents(["a b c d e f g"], plain_tokenizer, 3, 3)
    assert as_lists(windows) == [[2, 3, 4], [5, 6, 7]]
    assert windows.notices == ("documents: 2 window(s) instead of the 3 asked for",)


def test_remainder_is_used_when_it_is_all_there_is(plain_tokenizer):
    windows = windows_from_documents(["a b"], plain_tokenizer, 5, 1)
    assert as_lists(windows) == [[2, 3]]
    assert len(windows.notices) == 1
    assert "2 tokens do not fill one window of 5" in windows.notices[0]


def test_stride_overlaps_windows_and_scores_new_tokens_once(plain_tokenizer):
    windows = windows_from_documents([" ".join(LETTERS)], plain_tokenizer, 4, None, stride=2)
    assert as_lists(windows) == [[2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 10, 11]]
    assert [windows.scored(i) for i in range(4)] == [3, 2, 2, 2]
    assert sum(windows.scored(i) for i in range(4)) == len(LETTERS) - 1
    disjoint = windows_from_documents([" ".join(LETTERS)], plain_tokenizer, 5, None)
    assert [disjoint.scored(i) for i in range(2)] == [4, 4]


def test_documents_are_read_only_until_the_windows_are_full(plain_tokenizer):
    def documents():
        yield "a b c"
        yield "d e f"
        raise AssertionError("read too far")

    assert as_lists(windows_from_documents(documents(), plain_tokenizer, 3, 2)) == [[2, 3, 4], [5, 6, 7]]


def test_long_document_is_tokenised_only_as_far_as_needed(plain_tokenizer):
    class Counter:
        bos_token_id = bos_token = None
        lengths: ClassVar[list[int]] = []

        def __call__(self, document, **options):
            self.lengths.append(len(document))
            return plain_tokenizer(document, **options)

    # Words so long that the first guess falls short.
    document = " ".join(["abc" * 20 + " a", "b", "c"] * 30000)
    short = windows_from_documents([document], Counter(), 50, 4)
    whole = windows_from_documents([document], plain_tokenizer, 50, None)
    assert as_lists(short) == as_lists(whole)[:4]
    assert len(Counter.lengths) > 1
    assert max(Counter.lengths) < len(document) / 10


def test_digest_depends_on_the_ids_alone(plain_tokenizer):
    first = windows_from_documents(["a b c d"], plain_tokenizer, 2, 2, source="x")
    again = windows_from_samples([[2, 3], torch.tensor([4, 5], dtype=torch.int32)], None, 2, None, source="y")
    assert first.digest == again.digest
    assert first.digest == hashlib.sha256(struct.pack("<6q", 2, 2, 3, 2, 4, 5)).hexdigest()
    joined = windows_from_documents(["a b c d"], plain_tokenizer, 4, 1)
    other = windows_from_documents(["a b c e"], plain_tokenizer, 2, 2)
    assert len({first.digest, joined.digest, other.digest}) == 3


def test_too_little_text(tokenizer, plain_tokenizer):
    for documents in [["a"], [], ["", " "]]:
        with pytest.raises(CalibrationError) as excinfo:
            windows_from_documents(documents, plain_tokenizer, 4, 1, source="tiny.txt")
        one_line(excinfo, "tiny.txt", "at least 2")
    assert as_lists(windows_from_documents(["a"], tokenizer, 4, 1)) == [[1, 2]]


@pytest.mark.parametrize(
    ("seqlen", "limit", "stride", "part"),
    [(1, 1, None, "seqlen=1"), (4, 0, None, "0 windows"), (4, 1, 0, "stride=0"), (4, 1, 5, "stride=5")],
)
def test_impossible_sizes(plain_tokenizer, seqlen, limit, stride, part):
    with pytest.raises(InputError) as excinfo:
        windows_from_documents(["a b c d"], plain_tokenizer, seqlen, limit, stride)
    one_line(excinfo, part)


def test_ids_outside_the_vocabulary(plain_tokenizer):
    with pytest.raises(CalibrationError) as excinfo:
        windows_from_documents(["a b c d"], plain_tokenizer, 2, 2, source="s", vocab_size=5)
    one_line(excinfo, "s: window 1", "id 5", "vocabulary of 5", "tokenizer")
    assert windows_from_documents(["a b c d"], plain_tokenizer, 2, 2, vocab_size=6).total_tokens == 4


# --- windows from samples


def test_samples_of_every_kind():
    samples = [
        [5, 6, 7],
        torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]),
        {
            "input_ids": torch.tensor([[0, 0, 3, 4], [5, 6, 7, 0]]),
            "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 0]],
        },
        BatchEncoding({"input_ids": [8, 9, 0], "attention_mask": [1, 1, 0]}),
        {"input_ids": [[1, 2], [3, 4, 5]]},
    ]
    windows = windows_from_samples(samples, None, 4, None)
    assert as_lists(windows) == [
        [5, 6, 7],
        [1, 2, 3, 4],
        [6, 7, 8, 9],
        [3, 4],
        [5, 6, 7],
        [8, 9],
        [1, 2],
        [3, 4, 5],
    ]
    assert all(window.dtype == torch.int64 for window in windows.ids)
    assert windows.notices == ()
    assert "nothing added" in windows.bos


def test_short_samples_are_dropped_and_the_limit_holds():
    masked = {"input_ids": [1, 2, 3], "attention_mask": [0, 0, 1]}
    windows = windows_from_samples([[1], [], masked, [1, 2], [3, 4, 5]], None, 2, 3)
    assert as_lists(windows) == [[1, 2], [3, 4]]
    assert windows.notices == (
        "samples: 3 sample(s) with fewer than 2 tokens dropped",
        "samples: 2 window(s) instead of the 3 asked for",
    )

    def endless():
        while True:
            yield torch.ones(2, 3, dtype=torch.long)

    assert len(windows_from_samples(endless(), None, 3, 3).ids) == 3
    with pytest.raises(CalibrationError, match="1 dropped"):
        windows_from_samples([[1]], None, 2, 3)
    with pytest.raises(CalibrationError, match="no sample"):
        windows_from_samples([], None, 2, 3)


def test_string_samples_are_documents(tokenizer):
    windows = windows_from_samples(iter(["a b", "c"]), tokenizer, 5, 1)
    assert as_lists(windows) == [[1, 2, 3, 1, 4]]
    with pytest.raises(CalibrationError, match="tokenizer"):
        windows_from_samples(["a b"], None, 5, 1)
    with pytest.raises(CalibrationError, match=r"samples\[1\]: list among strings"):
        windows_from_samples(["a b", [1, 2]], tokenizer, 5, 1)


@pytest.mark.parametrize(
    ("sample", "part"),
    [
        ({"labels": [1]}, "no input_ids (keys: labels)"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "differ in shape"),
        (torch.zeros(2, 2), "torch.float32 of shape (2, 2)"),
        (torch.zeros(1, 2, 2, dtype=torch.long), "shape (1, 2, 2)"),
        (torch.tensor(3), "shape ()"),
        ((torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)), "shape (1, 4)"),
        ("text", "not a sequence of token ids"),
        ([1, None], "not a sequence of token ids"),
    ],
)
def test_other_samples_are_named(sample, part):
    with pytest.raises(CalibrationError) as excinfo:
        windows_from_samples([[1, 2], sample], None, 4, None, source="data")
    one_line(excinfo, "data[1]", part)


@pytest.mark.parametrize(("ids", "part"), [([1, -1], "id -1, negative"), ([1, 9], "id 9, outside")])
def test_sample_ids_are_checked(ids, part):
    with pytest.raises(CalibrationError) as excinfo:
        windows_from_samples([[1, 2], ids], None, 4, None, vocab_size=9)
    one_line(excinfo, "window 1", part)


# --- sizes


def test_clamp_seqlen():
    config = LlamaConfig(max_position_embeddings=64)
    assert clamp_seqlen(64, config) == (64, None)
    seqlen, notice = clamp_seqlen(65, config)
    assert seqlen == 64
    assert "seqlen=65" in notice
    assert "max_position_embeddings=64" in notice
    assert clamp_seqlen(65, SimpleNamespace(n_positions=32))[0] == 32
    assert clamp_seqlen(65, SimpleNamespace(max_sequence_length=48))[0] == 48
    assert clamp_seqlen(65, SimpleNamespace(max_position_embeddings=None)) == (65, None)
    assert clamp_seqlen(65, SimpleNamespace(max_position_embeddings=-1)) == (65, None)


def test_batches_hold_equal_windows_in_order():
    windows = windows_from_samples([[1, 2], [3, 4], [5, 6], [7, 8, 9], [1, 3]], None, 4, None)
    stacked = [batch.tolist() for batch in batches(windows, 2)]
    assert stacked == [[[1, 2], [3, 4]], [[5, 6]], [[7, 8, 9]], [[1, 3]]]
    with pytest.raises(InputError, match="batch_size=0"):
        list(batches(windows, 0))


def test_windows_are_divided_and_each_part_is_as_if_read_alone():
    samples = [list(range(i, i + 5 + i % 2)) for i in range(2, 8)]
    whole = windows_from_samples(samples, None, 16, 10)
    first, rest = whole.divided(4)
    for part, own in ((first, samples[:4]), (rest, samples[4:])):
        alone = windows_from_samples(own, None, 16, None)
        assert part.digest == alone.digest and part.total_tokens == alone.total_tokens
        assert [ids.tolist() for ids in part.ids] == own
    assert first.notices == whole.notices == ("samples: 6 window(s) instead of the 10 asked for",) and not rest.notices
    everything, none = whole.divided(10)
    assert everything.digest == whole.digest and none.ids == () and none.total_tokens == 0
