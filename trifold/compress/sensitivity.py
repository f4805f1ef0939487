"""How much of a layer's error reaches the hidden states behind its block."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from trifold.compress.capture import Call, own_state
from trifold.core.linears import set_weight, weight_of
from trifold.core.obs import relative_error

_ERROR = 0.01  # of a layer's output, that is tried
_TINY = 1e-12
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # an expert's, between the dots of a name


@torch.no_grad()
def sensitivities(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    call: Call,
    hidden: torch.Tensor,
    grams: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """Linear -> squared relative error of the block's output for a squared relative error of 1 of the linear's own.

    Each is tried with random noise on its weight, on one batch. grams: (in, in) of the linears' inputs. Of experts
    the first one stands for all.
    """

    def output() -> torch.Tensor:
        return own_state([call])[0].run(block, hidden).double()

    reference, found = output(), dict[str, float]()
    size = reference.square().sum().clamp(min=_TINY)
    for name, module in linears.items():
        kind = _NUMBER.sub("*", name)
        if kind in found:
            continue
        weight, generator = weight_of(module).clone(), torch.Generator().manual_seed(len(found))
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        error = relative_error(weight.float(), weight.float() + noise, grams[name])
        set_weight(module, weight + (noise * (_ERROR / max(error, _TINY)) ** 0.5).to(weight.dtype))
        changed = relative_error(weight.float(), weight_of(module).float(), grams[name])
        found[kind] = float((output() - reference).square().sum() / size) / max(changed, _TINY)
        set_weight(module, weight)
    return {name: found[_NUMBER.sub("*", name)] for name in linears}
