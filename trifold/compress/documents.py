"""Documents from a text file, a `.jsonl` file or a Hugging Face dataset."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trifold.core import embedded
from trifold.core.errors import CalibrationError

# Their rows are the lines of articles, not documents; published perplexities join them with blank lines.
_LINE_DATASETS = frozenset({"wikitext"})


def read_documents(source: str | os.PathLike[str], option: str = "--calib") -> Iterable[str]:
    """The documents of `source`: a `.jsonl` file (field "text"), a text file (one document), a dataset or `demo`.

    `demo` is the text that comes with the package, to calibrate with or to score, whichever `option` asks for.
    A dataset is `name`, `name:config` or `name:config:split` on the Hugging Face Hub; the split is "train"
    unless given, the column "text", and rows are streamed. The lines of wikitext are joined with blank
    lines into one document, the protocol of published perplexities. `option` is the command-line option
    that messages suggest.

    Raises CalibrationError: at once for a missing, empty or undecodable text file and for a dataset that
    cannot be reached; while iterating for a bad line (`file:line`) or row.
    """
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if not name:
        raise CalibrationError(f"{option}: the text source is empty; give a local file ({option} FILE)")
    if os.path.isdir(path):
        raise CalibrationError(f"{name}: is a folder; give one file inside it ({option} FILE)")
    if os.path.exists(path):
        if path.is_file() and path.stat().st_size == 0:
            raise CalibrationError(f"{name}: the file is empty; give a file with text ({option} FILE)")
        return _read_jsonl(path) if path.suffix.lower() == ".jsonl" else (_read_text(path),)
    if name == embedded.NAME:
        return _read_jsonl(embedded.TEXTS[option])
    if not isinstance(source, str) or _looks_like_path(name):
        raise CalibrationError(f"{name}: no such file; give an existing file ({option} FILE)")
    return _read_dataset(name, option)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not text.strip():
        raise CalibrationError(f"{path}: nothing but white space; give a file with text")
    return text


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path}:{number}: not UTF-8 text; convert it to UTF-8") from error
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}:{number}: not a JSON object ({error.msg}); mend the line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CalibrationError(f'{path}:{number}: no string field "text"; every line needs one')
        yield text


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    return CalibrationError(f"{path}: cannot be read ({error.strerror}); check the file")


def _looks_like_path(name: str) -> bool:
    """Whether `name` is no dataset: `org/name` may be one, whatever follows a colon is config and split."""
    head = name.split(":", 1)[0]
    separators = head.count("/")
    return (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or separators > 1
        or head.endswith("/")
        or re.search(r"\.[A-Za-z]\w{0,9}$", head) is not None
    )


def _read_dataset(source: str, option: str) -> Iterator[str]:
    name, config, split = (*source.split(":"), "", "", "")[:3]
    advice = f"give a local file ({option} FILE)"
    if not name or source.count(":") > 2:
        raise CalibrationError(f"{source}: not of the form name:config:split; name a dataset so or {advice}")
    what = f"{source}: no such file, and the dataset {name!r} cannot be fetched"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise CalibrationError(f"{what} offline ({variable} is set); {advice}")
    try:
        import huggingface_hub

        huggingface_hub.dataset_info(name, timeout=10)  # one attempt, where loading would try again and again
        import datasets

        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:
        raise CalibrationError(f"{what} ({_first_line(error)}); {advice}") from error
    texts = _dataset_texts(rows, source, advice)
    return _joined(texts) if name.rsplit("/", 1)[-1] in _LINE_DATASETS else texts


def _dataset_texts(rows: Iterable[Mapping[str, Any]], source: str, advice: str) -> Iterator[str]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:
            raise CalibrationError(f"{source}: reading broke off ({_first_line(error)}); {advice}") from error
        if row is None:
            return
        if not isinstance(row.get("text"), str):
            columns = ", ".join(row)
            raise CalibrationError(f'{source}: no string column "text" (columns: {columns}); {advice}')
        yield row["text"]


def _joined(texts: Iterable[str]) -> Iterator[str]:
    yield "\n\n".join(texts)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
