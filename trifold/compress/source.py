"""Where a model comes from, one block at a time, with weights that may be changed freely.

The source itself never changes: not the files, and not a live model before its compression is complete.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trifold.core.errors import CheckpointError, InputError
from trifold.core.obs import all_finite
from trifold.core.topology import find_blocks, towers


class Source(ABC):
    """A causal language model that can be walked block by block.

    model: the whole module tree; parameters of closed blocks may be on the meta device. blocks: path of the
    ModuleList. dtype: what weights are loaded, computed and stored in. notices: what the user should know.
    """

    model: Any
    blocks: str
    dtype: torch.dtype
    device: torch.device
    name: str
    tokenizer: Any = None
    notices: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def block_count(self) -> int:
        return len(self.model.get_submodule(self.blocks))

    @abstractmethod
    def open_outside(self) -> None:
        """Load everything outside the blocks: embeddings, norms, rotary tables, head."""

    @abstractmethod
    def open_block(self, index: int) -> nn.Module:
        """The block with its weights, free to be modified."""

    @abstractmethod
    def close_block(self, index: int) -> None:
        """Give the block's memory back."""

    @abstractmethod
    def close_outside(self) -> None:
        """Give the memory of everything outside the blocks back."""

    def close_ends(self) -> bool:
        """Give the memory of embeddings and head back while blocks are walked. Returns whether it could."""
        return False

    def open_ends(self) -> None:
        """Read embeddings and head again, after `close_ends`."""
        return

    def prefetch(self, index: int) -> None:
        """Let the system read a block ahead, if there is one of this number and it lies on a disk."""
        return

    @abstractmethod
    def check_finite(self) -> None:
        """Raise CheckpointError naming the first tensor that holds NaN or infinity."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to continue."""

    @abstractmethod
    def copy_files(self, destination: Path) -> None:
        """Everything but the weights and config.json: tokenizer, templates, licence."""

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """config.json as it is at the source."""


class LiveSource(Source):
    """A model in memory. Blocks are handed out as copies, or with `inplace` as they are."""

    def __init__(self, model: Any, tokenizer: Any = None, inplace: bool = False) -> None:
        config = getattr(model, "config", None)
        if config is None or not callable(getattr(model, "get_output_embeddings", None)):
            raise InputError(f"{type(model).__name__} is not a transformers causal language model")
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(f"{type(model).__name__} is already quantised; give the dense model")
        if model.get_output_embeddings() is None:
            raise InputError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
        self.model, self.tokenizer, self.inplace = model, tokenizer, inplace
        self.blocks, self.dtype, self.device = find_blocks(model), model.dtype, model.device
        self.name = Path(config._name_or_path).name or type(model).__name__
        self.notices = tower_notice(model)

    def open_outside(self) -> None:
        return None

    def open_block(self, index: int) -> nn.Module:
        block = self.model.get_submodule(f"{self.blocks}.{index}")
        return block if self.inplace else copy.deepcopy(block)

    def close_block(self, index: int) -> None:
        return None

    def close_outside(self) -> None:
        return None

    def check_finite(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not all_finite(parameter.detach()):
                raise CheckpointError(f"{name} holds NaN or infinity; repair the model first")

    def fingerprint(self) -> dict[str, Any]:
        from trifold.formats import digest

        return {"model": digest(dict(self.model.named_parameters())), "config": self.config_dict()}

    def copy_files(self, destination: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(destination)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(destination)

    def config_dict(self) -> dict[str, Any]:
        config = self.config.to_dict()
        config["architectures"] = [type(self.model).__name__]
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        return json.loads(json.dumps(config, default=str))


def tower_notice(model: Any) -> tuple[str, ...]:
    """What is said of a model that is more than a text decoder."""
    found = towers(model)
    if not found:
        return ()
    count = sum(p.numel() for name in found for p in model.get_submodule(name).parameters())
    return (f"only the text decoder is compressed: {', '.join(found)} ({count / 1e6:.1f} M parameters) stay dense",)


def materialise_buffers(model: Any, device: torch.device | str = "cpu") -> None:
    """Give non-persistent buffers (rotary tables, scalars) their values on a model built on meta."""
    with torch.no_grad():
        for module in model.modules():
            module._is_hf_initialized = False
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for name, buffer in list(model.named_non_persistent_buffers()):
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device=device)
        model.initialize_weights()
