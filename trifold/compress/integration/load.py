"""`trifold.load`: a checkpoint, ours or any dense one, ready to run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trifold.compress.block import Compressed
from trifold.compress.source import DTYPES, model_folder, shard_files
from trifold.core.errors import CheckpointError


def load(
    model: str | os.PathLike[str], dtype: str | torch.dtype = "auto", device_map: Any = None, **kwargs: Any
) -> Any:
    """A causal language model from a folder or hub id, in eval mode; packed weights stay packed.

    Other keywords go to transformers' `from_pretrained`. Raises CheckpointError if the folder cannot be read
    or a tensor is missing, left over or of the wrong shape.
    """
    from transformers import AutoModelForCausalLM

    import trifold.compress.integration.quantizer  # noqa: F401 - registers our format

    folder = model_folder(model, kwargs.pop("revision", None))
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder")
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, device_map=device_map, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {str(error).strip().splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            count, example = len(info[problem]), sorted(map(str, info[problem]))[0]
            raise CheckpointError(f"{folder}: {count} {problem.replace('_', ' ')}, e.g. {example}")
    return loaded.eval()


def load_tokenizer(model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint. Raises CheckpointError if it has none."""
    from transformers import AutoTokenizer

    folder = model_folder(model)
    try:
        return AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no tokenizer ({str(error).strip().splitlines()[0]})") from error


def read_compressed(folder: Path) -> Compressed:
    """Every tensor and spec of one of our checkpoints."""
    config = json.loads((folder / "config.json").read_text())
    found = Compressed(modules=config["quantization_config"]["modules"])
    for file in sorted(set(shard_files(folder).values())):
        found.tensors.update(load_file(file))
    return found
