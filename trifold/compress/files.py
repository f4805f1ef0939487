"""Model folders and their files; names of dtypes and devices."""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trifold.core import embedded
from trifold.core.errors import CheckpointError, InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WEIGHT_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".ckpt",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".index.json",
)
_NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.gguf"]
NO_PICKLES = "pickled weights (.bin, .pt) can run code and are never read: convert them to safetensors first"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reason(error: BaseException) -> str:
    """What a foreign error says, on one line."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def model_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A local folder for a folder name, a hub id (downloaded, or from the cache when offline) or `demo`.

    A hub id may have a branch, tag or commit behind an @, as `revision` says it otherwise. `demo` is the model that
    comes with the package, unless there is a folder of that name. Raises CheckpointError if there is no such folder
    and the hub has no such model or cannot be reached.
    """
    name = os.fspath(model)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return path
    if name == embedded.NAME:
        return embedded.MODEL
    repo, _, named = name.partition("@")
    if os.path.exists(path) or path.is_absolute() or name.startswith(".") or repo.count("/") != 1:
        raise CheckpointError(f"{name!r}: no such model folder (a hub id looks like 'organisation/name')")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or named or None, ignore_patterns=_NOT_FETCHED))
    except Exception as error:
        offline = "it is not in the cache, and HF_HUB_OFFLINE is set"
        why = offline if constants.HF_HUB_OFFLINE else reason(error)
        raise CheckpointError(f"{name}: no such folder, and the hub does not give it ({why})") from error


def shard_files(folder: Path) -> dict[str, Path]:
    """Tensor key -> file, from the index or the single file, each header read. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a valid index ({reason(error)}); copy the model again") from error
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        raise CheckpointError(f"{folder}: no model.safetensors; {NO_PICKLES}")
    files: dict[str, Path] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named in the index but missing; copy the model again")
        try:
            with safe_open(folder / name, framework="pt") as handle:
                files.update(dict.fromkeys(handle.keys(), folder / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / name}: truncated or not safetensors ({reason(error)}); copy the model again"
            ) from error
    return files


def copy_companions(folder: Path, destination: Path, without: Collection[str] = ("config.json",)) -> None:
    """Everything but weights, hidden files and the files `without`: tokenizer, templates, licence."""
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in place.parts)
        if hidden or not file.is_file() or str(place) in without or file.name.endswith(_WEIGHT_FILES):
            continue
        (destination / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination / place)


def float_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by name or as it is. Raises InputError unless it is a float of 16 or 32 bits."""
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise InputError(f"dtype={name!r}: use auto, {', '.join(DTYPES)}")
    return dtype


def usable_device(name: str) -> torch.device:
    """The device of this name. Raises InputError if this machine has none."""
    try:
        return torch.empty(1, device=name).device
    except Exception as error:  # each backend has its own
        raise InputError(
            f"--device {name}: cannot be used here ({reason(error)}); give another, such as cpu"
        ) from error


def parse_size(text: str | int, option: str) -> int:
    """Bytes of '5GB', '200 MiB' or a number, as `option` gives them. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise InputError(f"{option} {text!r}: write it as 5GB, 200MB or a number of bytes")
    return size
