"""Checkpoints of other ecosystems, run on our packed modules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trifold.compress.checkpoint import quantization_block
from trifold.compress.integration.auto import auto_class
from trifold.compress.packed_folder import open_packed
from trifold.compress.tensor_file import Entry


class LazyTensor:
    """What transformers' loader takes for a slice of a file: the tensor is made when it is indexed."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def get_dtype(self) -> str:
        return self.entry.dtype_name

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.entry.load()[index]


def load_foreign(
    folder: Path, config: Any, dtype: str | torch.dtype = "auto", **settings: Any
) -> tuple[Any, Mapping[str, Any]]:
    """A model on packed modules, and transformers' report of loading. config: of the folder, which is changed.

    Tensors are converted one layer at a time. A bias of zeros, which some tools store for every layer, is left out
    where the model has none; so is what has no place in the model and belongs to no packed layer.
    Raises CheckpointError or InputError for a checkpoint that is not read.
    """
    from transformers import GenerationConfig

    packed = open_packed(folder)
    if dtype == "auto":
        dtype = config.dtype or packed.stored_dtype
    config.quantization_config = quantization_block({"base_model": folder.name, "modules": packed.modules})
    tensors = {name: LazyTensor(entry) for name, entry in packed.tensors.items()}
    kind = auto_class(config)._model_mapping[type(config)]
    model, info = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **settings
    )
    model.name_or_path = model.config.name_or_path = str(folder)
    with contextlib.suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    odd = [key for key in info.get("unexpected_keys") or () if not _spare(key, packed.modules, packed.tensors)]
    return model, {**info, "unexpected_keys": odd}


def _spare(key: str, modules: Mapping[str, Any], tensors: Mapping[str, Entry]) -> bool:
    layer, _, leaf = key.rpartition(".")
    return layer not in modules or (leaf == "bias" and not tensors[key].load().any())
