"""Which modules are matrix products, and their weights as (out, in)."""

from __future__ import annotations

import torch
from torch import nn

_PLAIN_SUBCLASSES = {"FalconLinear"}  # their own forward is nn.Linear's
_TRANSPOSED = {"Conv1D"}  # transformers.pytorch_utils.Conv1D keeps its weight as (in, out)


def is_transposed(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D, whose weight is (in, out)."""
    return type(module).__name__ in _TRANSPOSED


def is_linear(module: nn.Module) -> bool:
    """True if the module computes x Wᵀ + b and nothing else. Routers that subclass nn.Linear are not."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or type(module).__name__ in _PLAIN_SUBCLASSES or is_transposed(module)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in); a view, whatever the module's layout."""
    weight = module.get_parameter("weight").data
    return weight.T if is_transposed(module) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Replace the weight by an (out, in) one, cast to the parameter's dtype."""
    parameter = module.get_parameter("weight")
    parameter.data = (weight.T if is_transposed(module) else weight).to(parameter.dtype).contiguous()
    _note_size(module, *weight.shape)


def resize(module: nn.Module, rows: int, columns: int) -> None:
    """Give a linear an empty weight of another size, and a bias to go with it."""
    parameter, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    parameter.data = parameter.data.new_empty((columns, rows) if is_transposed(module) else (rows, columns))
    if bias is not None and len(bias) != rows:
        bias.data = bias.data.new_empty(rows)
    _note_size(module, rows, columns)


def _note_size(module: nn.Module, rows: int, columns: int) -> None:
    names = ("nf", "nx") if is_transposed(module) else ("out_features", "in_features")
    for name, size in zip(names, (rows, columns), strict=True):
        if hasattr(module, name):
            setattr(module, name, size)


def is_embedding(module: nn.Module) -> bool:
    """True for a table whose rows are looked up and nothing else."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def is_compressible(module: nn.Module) -> bool:
    """True for a matrix product with at least two outputs and inputs."""
    return is_linear(module) and min(module.get_parameter("weight").shape) > 1


def linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Everything compressible below `module`, by name."""
    return {name: child for name, child in module.named_modules(prefix=prefix) if is_compressible(child)}
