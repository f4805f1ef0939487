"""Where a model comes from: a folder of safetensors read block by block, or a live model.

Both give one block at a time, with weights that may be changed freely; the source itself never changes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import textwrap
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trifold.core.errors import CheckpointError, InputError
from trifold.core.topology import find_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_FLOATS = ("F64", "F32", "BF16", "F16")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")


def reason(error: BaseException) -> str:
    """What a foreign error says, on one line."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def model_folder(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A local folder for a folder name or a hub id (downloaded, or from the cache when offline).

    Raises CheckpointError if there is no such folder and the hub has no such model or cannot be reached.
    """
    name = os.fspath(model)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return path
    if os.path.exists(path) or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"{name!r}: no such model folder (a hub id looks like 'organisation/name')")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
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
        raise CheckpointError(f"{folder}: no model.safetensors; convert the model to safetensors first")
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


class FolderSource(Source):
    """A checkpoint folder. Raises CheckpointError or InputError if it is not a dense causal language model."""

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder, self.name, self.device = folder, name, usable_device(device)
        config = _causal_config(folder, name, trust_remote_code)
        self.files = shard_files(folder)
        self.dtype = self._stored_dtype(config) if dtype == "auto" else float_dtype(dtype)
        config.dtype = self.dtype
        try:
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, trust_remote_code=trust_remote_code
                )
        except Exception as error:  # whatever a value in config.json breaks
            raise CheckpointError(f"{folder}/config.json: no model can be built from it ({reason(error)})") from error
        self.model.eval()
        self.blocks = find_blocks(self.model)
        with contextlib.suppress(Exception):  # a tokenizer may fail in any way, and is not always needed
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        targets, converted = self._key_targets()
        known = self.model.state_dict()
        self._targets = {key: target for key, target in targets.items() if target in known}
        self.notices = _unused(self.model, name, targets.keys() - self._targets.keys())
        self._check_headers(known, converted)

    def _stored_dtype(self, config: Any) -> torch.dtype:
        if config.dtype is not None:
            return config.dtype if config.dtype in DTYPES.values() else torch.float32
        with safe_open(next(iter(self.files.values())), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                dtype = handle.get_tensor(key).dtype
                if dtype in DTYPES.values():
                    return dtype
        return torch.float32

    def _mapping(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self.model)

    def _key_targets(self) -> tuple[dict[str, str], set[str]]:
        """Checkpoint key -> parameter name, by transformers' own rules; and the keys whose shape they change."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = self._mapping()
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        meta, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets, converted = {}, set()
        for key in sorted(self.files, key=dot_natural_key):
            name, converter = rename_source_key(key, renamings, converters, prefix, meta)
            if name not in meta and key in meta:
                name, converter = rename_source_key(key, [], [], prefix, meta)
            targets[key] = name
            if converter is not None:
                converted.add(key)
        return targets, converted

    def _check_headers(self, known: Mapping[str, torch.Tensor], converted: set[str]) -> None:
        """No tensor is missing, of another shape than config.json says, or quantised already."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in known if name not in tied and name not in set(self._targets.values())]
        if missing:
            count = f"{len(missing)} tensor" + "s" * (len(missing) > 1)
            raise CheckpointError(f"{self.folder}: {count} missing, e.g. {missing[0]}; copy the model again")
        for file, keys in self._keys_by_file(self._targets):
            with safe_open(file, framework="pt") as handle:
                for key in keys:
                    part, wanted = handle.get_slice(key), known[self._targets[key]]
                    if wanted.is_floating_point() and part.get_dtype() not in _STORED_FLOATS:
                        raise InputError(
                            f"{file}: {key} is stored as {part.get_dtype()}, so the model is already quantised; "
                            "give the dense model it was made from"
                        )
                    if key not in converted and list(part.get_shape()) != list(wanted.shape):
                        raise CheckpointError(
                            f"{file}: {key} has shape {part.get_shape()}, config.json makes it {list(wanted.shape)}; "
                            "copy the model again"
                        )

    def _keys_by_file(self, keys: Iterable[str]) -> list[tuple[Path, list[str]]]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for key in keys:
            by_file[self.files[key]].append(key)
        return list(by_file.items())

    def _load(self, keep: Any) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        chosen = [key for key, target in self._targets.items() if keep(target)]
        with contextlib.ExitStack() as stack, _no_progress_bars():
            slices = {}
            for file, keys in self._keys_by_file(chosen):
                handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                slices.update({key: handle.get_slice(key) for key in keys})
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                slices,
                LoadStateDictConfig(
                    device_map={"": str(self.device)},
                    dtype=self.dtype,
                    dtype_plan=self.model._get_dtype_plan(self.dtype),
                    weight_mapping=self._mapping(),
                ),
                None,
            )
        bad = info.conversion_errors or info.mismatched_keys or info.unexpected_keys
        if bad:
            raise CheckpointError(f"{self.folder}: tensors do not fit the architecture: {sorted(map(str, bad))[0]}")

    def open_outside(self) -> None:
        materialise_buffers(self.model, self.device)
        self._load(lambda target: not target.startswith(self.blocks + "."))
        self.model.tie_weights()

    def open_block(self, index: int) -> nn.Module:
        prefix = f"{self.blocks}.{index}."
        self._load(lambda target: target.startswith(prefix))
        block = self.model.get_submodule(prefix[:-1])
        for parameter in block.parameters():  # loaded ones may be views of the mapped file
            parameter.data = parameter.data.clone()
        return block

    def close_block(self, index: int) -> None:
        for module in self.model.get_submodule(f"{self.blocks}.{index}").modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")

    def check_finite(self) -> None:
        for file, keys in self._keys_by_file(self._targets):
            with safe_open(file, framework="pt") as handle:
                for key in keys:
                    tensor = handle.get_tensor(key)
                    if not tensor.is_floating_point():
                        continue
                    if not torch.isfinite(tensor).all():
                        raise CheckpointError(f"{file}: {key} holds NaN or infinity; repair the model first")
                    if not torch.isfinite(tensor.to(self.dtype)).all():
                        raise InputError(f"{file}: {key} overflows {self.dtype}; choose dtype bfloat16 or float32")

    def fingerprint(self) -> dict[str, Any]:
        files = sorted(set(self.files.values()))
        return {
            "model": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
            "config": self.config_dict(),
        }

    def copy_files(self, destination: Path) -> None:
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHT_FILES):
                shutil.copyfile(file, destination / file.name)

    def config_dict(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())


def _causal_config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The config of a dense causal language model. Raises CheckpointError or InputError for anything else."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of every kind
        if "custom code" in str(error):
            raise CheckpointError(f"{name}: the model brings its own code; --trust-remote-code runs it") from error
        raise CheckpointError(f"{folder}/config.json: {reason(error)}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "method unknown")
        raise InputError(f"{name}: already quantised ({method}); give the dense model it was made from")
    architectures = config.architectures or []
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise InputError(f"{name}: {config.model_type} is not a causal language model; give a decoder")
    if architectures and not any(a.endswith(("CausalLM", "LMHeadModel")) for a in architectures):
        raise InputError(f"{name}: {architectures[0]} is not a causal language model; give a decoder")
    return config


def _unused(model: Any, name: str, keys: Iterable[str]) -> tuple[str, ...]:
    """A notice of stored tensors that the architecture has no place for, as older checkpoints have some."""
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    odd = sorted(key for key in keys if not any(re.search(pattern, key) for pattern in known))
    if not odd:
        return ()
    return (f"{name}: {len(odd)} stored tensor(s) without a place in the architecture are left out, e.g. {odd[0]}",)


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

    def open_outside(self) -> None:
        return None

    def open_block(self, index: int) -> nn.Module:
        block = self.model.get_submodule(f"{self.blocks}.{index}")
        return block if self.inplace else copy.deepcopy(block)

    def close_block(self, index: int) -> None:
        return None

    def check_finite(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
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


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Quiet transformers' bar of every block; ours shows the whole."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
