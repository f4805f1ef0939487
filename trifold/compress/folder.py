"""A model read block by block from a folder of safetensors, through transformers' own weight conversion."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trifold.compress.files import DTYPES, copy_companions, float_dtype, reason, shard_files, usable_device
from trifold.compress.integration.auto import auto_class, is_known
from trifold.compress.source import Source, materialise_buffers, tower_notice
from trifold.compress.tensor_file import read_ahead, read_parts
from trifold.core.errors import CheckpointError, InputError, ResourceError
from trifold.core.obs import all_finite
from trifold.core.topology import find_blocks
from trifold.kernels import is_stacked

_STORED_FLOATS = ("F64", "F32", "BF16", "F16")


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
        from transformers import AutoTokenizer

        self.folder, self.name, self.device = folder, name, usable_device(device)
        config = causal_config(folder, name, trust_remote_code)
        self.files = shard_files(folder)
        self.dtype = self._stored_dtype(config) if dtype == "auto" else float_dtype(dtype)
        self.model = meta_model(config, self.dtype, folder / "config.json", trust_remote_code)
        self.blocks = find_blocks(self.model)
        self._skeletons: dict[int, nn.Module] = {}  # of open blocks whose experts are taken apart
        with contextlib.suppress(Exception):  # a tokenizer may fail in any way, and is not always needed
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        targets, converted = self._key_targets()
        known = self.model.state_dict()
        self._targets = {key: target for key, target in targets.items() if target in known}
        self.notices = (*_unused(self.model, name, targets.keys() - self._targets.keys()), *tower_notice(self.model))
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
                try:
                    handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    raise ResourceError(
                        f"{file}: cannot be read any more ({reason(error)}); mend it, then run the same command to "
                        "go on"
                    ) from error
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
        block = self.model.get_submodule(prefix[:-1])
        if any(map(is_stacked, block.modules())):  # experts will be taken apart
            self._skeletons[index] = copy.deepcopy(block)
        self._load(lambda target: target.startswith(prefix))
        for parameter in block.parameters():  # loaded ones may be views of the mapped file
            parameter.data = parameter.data.clone()
        return block

    def close_block(self, index: int) -> None:
        if index in self._skeletons:
            self.model.get_submodule(self.blocks)[index] = self._skeletons.pop(index)
            return
        self._close(self.model.get_submodule(f"{self.blocks}.{index}"))

    def close_outside(self) -> None:
        self._close(self.model)

    def _ends(self) -> list[nn.Module]:
        """Embeddings and head, unless a block holds them too."""
        inside = set(self.model.get_submodule(self.blocks).modules())
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return [end for end in ends if end is not None and end not in inside]

    def close_ends(self) -> bool:
        for end in self._ends():
            self._close(end)
        return True

    def open_ends(self) -> None:
        ends = self._ends()
        names = [name for name, module in self.model.named_modules(remove_duplicate=False) if module in ends]
        self._load(lambda target: any(target.startswith(name + ".") for name in names))
        self.model.tie_weights()

    def prefetch(self, index: int) -> None:
        prefix = f"{self.blocks}.{index}."
        for file, keys in self._keys_by_file(key for key, target in self._targets.items() if target.startswith(prefix)):
            read_ahead(file, keys)

    def _close(self, part: nn.Module) -> None:
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")

    def check_finite(self) -> None:
        for file, keys in self._keys_by_file(self._targets):
            try:
                for key, part in read_parts(file, keys):
                    if not part.is_floating_point():
                        continue
                    if not all_finite(part):
                        raise CheckpointError(f"{file}: {key} holds NaN or infinity; repair the model first")
                    if not all_finite(part, self.dtype):
                        raise InputError(f"{file}: {key} overflows {self.dtype}; choose dtype bfloat16 or float32")
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read ({error.strerror}); copy the model again") from error

    def fingerprint(self) -> dict[str, Any]:
        files = sorted(set(self.files.values()))
        return {
            "model": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
            "config": self.config_dict(),
        }

    def copy_files(self, destination: Path) -> None:
        copy_companions(self.folder, destination)

    def config_dict(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())


def meta_model(config: Any, dtype: torch.dtype, path: Path, trust_remote_code: bool = False) -> Any:
    """The model of a config without weights, in eval mode. Raises CheckpointError naming `path`."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a value in config.json breaks
        raise CheckpointError(f"{path}: no model can be built from it ({reason(error)})") from error
    return model.eval()


def _config_file(path: Path) -> Path:
    return path if path.is_file() else path / "config.json"


def causal_config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The config of a dense causal language model, from its folder or a bare file.

    Raises CheckpointError or InputError for anything else.
    """
    from transformers import AutoConfig

    if folder.is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of every kind
        if "custom code" in str(error):
            raise CheckpointError(f"{name}: the model brings its own code; --trust-remote-code runs it") from error
        raise CheckpointError(f"{_config_file(folder)}: {reason(error)}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "method unknown")
        raise InputError(f"{name}: already quantised ({method}); give the dense model it was made from")
    if not is_known(config) and not trust_remote_code:
        kind = (config.architectures or [config.model_type])[0]
        raise InputError(f"{name}: {kind} is not a causal language model; give a decoder")
    return config


def _unused(model: Any, name: str, keys: Iterable[str]) -> tuple[str, ...]:
    """A notice of stored tensors that the architecture has no place for, as older checkpoints have some."""
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    odd = sorted(key for key in keys if not any(re.search(pattern, key) for pattern in known))
    if not odd:
        return ()
    return (f"{name}: {len(odd)} stored tensor(s) without a place in the architecture are left out, e.g. {odd[0]}",)


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
