"""Which kernel runs each layer of a checkpoint, found without loading its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from trifold.compress.files import float_dtype, reason
from trifold.compress.integration.auto import auto_class
from trifold.compress.integration.modules import replace_modules
from trifold.compress.packed_folder import is_foreign, open_packed
from trifold.core.errors import CheckpointError
from trifold.kernels import Choice, PackedLinear


def kernel_choices(
    folder: Path, device: torch.device | str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, Choice]:
    """The choice for every packed linear layer, tied heads included, by name. dtype: of the activations, "auto" is
    the checkpoint's. Raises CheckpointError if no model can be built from the folder's config, InputError if
    TRIFOLD_KERNEL names a kernel that cannot run a layer.
    """
    from transformers import AutoConfig

    import trifold.compress.integration.quantizer  # noqa: F401 - registers our format

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        wanted = (config.dtype or torch.float32) if dtype == "auto" else float_dtype(dtype)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: no model can be built from its config ({reason(error)})") from error
    quantization = config.quantization_config
    modules = open_packed(folder).modules if is_foreign(quantization) else quantization["modules"]
    replace_modules(model, modules, quantization.get("slices"))
    parts = {
        id(part)
        for module in model.modules()
        if isinstance(module, PackedLinear)
        for part in module.modules()
        if part is not module
    }
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear) and id(m) not in parts)
    return {name: module.choice(wanted, device) for name, module in layers}
