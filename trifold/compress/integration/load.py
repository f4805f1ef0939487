"""`trifold.load`: a checkpoint, ours or any dense one, ready to run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trifold.compress.block import Compressed
from trifold.compress.source import DTYPES, model_folder, reason, shard_files
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
    kwargs.setdefault("trust_remote_code", False)  # None asks on the terminal
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=wanted,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {reason(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            kind, example = problem.removesuffix("_keys"), sorted(map(str, info[problem]))[0]
            raise CheckpointError(
                f"{folder}: {len(info[problem])} {kind} tensor(s), e.g. {example}; copy the model again"
            )
    return loaded.eval()


def load_tokenizer(model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint. Raises CheckpointError if it has none."""
    from transformers import AutoTokenizer

    folder = model_folder(model)
    try:
        return AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": False, **kwargs})
    except Exception as error:  # the tokenizers library raises that
        raise CheckpointError(f"{folder}: no tokenizer that can be read ({reason(error)})") from error


def read_compressed(folder: Path) -> Compressed:
    """Every tensor and spec of one of our checkpoints."""
    config = json.loads((folder / "config.json").read_text())
    found = Compressed(modules=config["quantization_config"]["modules"])
    for file in sorted(set(shard_files(folder).values())):
        found.tensors.update(load_file(file))
    return found
