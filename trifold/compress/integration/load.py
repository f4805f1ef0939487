"""`trifold.load`: a checkpoint, ours, another ecosystem's or any dense one, ready to run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trifold.compress.compressed import Compressed
from trifold.compress.files import NO_PICKLES, float_dtype, model_folder, reason, shard_files
from trifold.compress.integration.auto import auto_class
from trifold.compress.integration.foreign import load_foreign
from trifold.compress.packed_folder import is_foreign
from trifold.core.errors import CheckpointError


def load(
    model: str | os.PathLike[str], dtype: str | torch.dtype = "auto", device_map: Any = None, **kwargs: Any
) -> Any:
    """A language model from a folder or hub id, in eval mode; packed weights stay packed.

    Checkpoints of compressed-tensors, GPTQ and AWQ run on our kernels, their codes unchanged.
    Other keywords go to transformers' `from_pretrained`; code that comes with the model runs only with
    `trust_remote_code=True`. Raises CheckpointError if the folder cannot be read or a tensor is missing, of the
    wrong shape or, in one of our checkpoints, left over.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import trifold.compress.integration.quantizer  # noqa: F401 - registers our format

    folder = model_folder(model, kwargs.pop("revision", None))
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no model.safetensors; {NO_PICKLES}")
    wanted = dtype if dtype == "auto" else float_dtype(dtype)
    # Asking on the terminal is no default for a library; mismatches are refused below, by name.
    settings: dict[str, Any] = {"trust_remote_code": False, "ignore_mismatched_sizes": True, "use_safetensors": True}
    settings |= kwargs
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings["trust_remote_code"])
        if is_foreign(getattr(config, "quantization_config", None)):
            loaded, info = load_foreign(folder, config, dtype=wanted, device_map=device_map, **settings)
        else:
            loaded, info = auto_class(config).from_pretrained(
                folder, dtype=wanted, device_map=device_map, output_loading_info=True, **settings
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if "custom code" in str(error):
            raise CheckpointError(f"{folder}: the model brings its own code; trust_remote_code=True runs it") from error
        raise CheckpointError(f"{folder}: {reason(error)}") from error
    ours = getattr(loaded, "hf_quantizer", None) is not None
    for kind in ("missing", "mismatched", *(["unexpected"] if ours else [])):
        problems = sorted(info.get(f"{kind}_keys") or (), key=str)
        if problems:
            example = " ".join(map(str, problems[0])) if isinstance(problems[0], tuple) else problems[0]
            raise CheckpointError(f"{folder}: {len(problems)} {kind} tensor(s), e.g. {example}; copy the model again")
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
    quantization = config["quantization_config"]
    found = Compressed(modules=quantization["modules"], slices=quantization.get("slices", {}))
    for file in sorted(set(shard_files(folder).values())):
        found.tensors.update(load_file(file))
    return found
