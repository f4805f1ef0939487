"""Our checkpoints under plain `from_pretrained`: a quantisation method registered with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trifold.compress.checkpoint import FORMAT_VERSION, QUANT_METHOD, check_version
from trifold.compress.integration.modules import replace_modules
from trifold.core.errors import CheckpointError
from trifold.kernels import PackedModule


@register_quantization_config(QUANT_METHOD)
class TrifoldConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, kept as it is. Raises CheckpointError for a newer major format."""

    def __init__(
        self,
        modules: dict[str, Any] | None = None,
        format_version: str = FORMAT_VERSION,
        slices: dict[str, dict[str, Any]] | None = None,
        **rest: Any,
    ):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = {} if modules is None else modules
        self.slices = {} if slices is None else slices
        self.rest = {k: v for k, v in rest.items() if k != "quant_method"}
        check_version(format_version)
        for name, value in (("modules", self.modules), ("slices", self.slices)):
            if not isinstance(value, dict):
                raise CheckpointError(f"config.json: `{name}` is not a mapping of layers; copy the checkpoint again")

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "modules": self.modules,
            **({"slices": self.slices} if self.slices else {}),
            **self.rest,
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class TrifoldQuantizer(HfQuantizer):
    """Puts packed modules into the skeleton; the tensors then load by name."""

    requires_calibration = True
    quantization_config: TrifoldConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        replace_modules(model, self.quantization_config.modules, self.quantization_config.slices)
        if checkpoint_files:
            _check_tensors(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _check_tensors(model: Any, files: Sequence[str]) -> None:
    """transformers only warns of missing tensors and keeps garbage, and not every version tells of dense ones of
    another shape; packed ones have to be there and fit."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                part = handle.get_slice(key)
                found[key] = (tuple(part.get_shape()), part.get_dtype())
    for name, parameter in model.named_parameters():
        shape, _ = found.get(name, (tuple(parameter.shape), ""))
        if shape != tuple(parameter.shape):
            fits = f"{name} is of shape {shape}, not {tuple(parameter.shape)}"
            raise CheckpointError(f"mismatched tensor: {fits}; copy the checkpoint again")
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for leaf, buffer in module.named_buffers():
                shape, dtype = found.get(f"{name}.{leaf}", (None, ""))
                if shape != tuple(buffer.shape):
                    state = "missing" if shape is None else f"of shape {shape}, not {tuple(buffer.shape)}"
                    raise CheckpointError(f"{name}.{leaf} is {state}; copy the checkpoint again")
                held = "F8_E4M3" if buffer.dtype == torch.float8_e4m3fn else ("I", "U")
                if (not buffer.is_floating_point() or buffer.itemsize == 1) and not dtype.startswith(held):
                    raise CheckpointError(f"{name}.{leaf} holds codes, but as {dtype}; copy the checkpoint again")
