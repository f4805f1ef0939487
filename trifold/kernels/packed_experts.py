"""The experts of a mixture, one pair of linears each, instead of stacked three-dimensional parameters.

Apart, every expert is a weight like any other: it is observed, solved, stored and run packed under a name of
its own, `experts.{e}.up` and `experts.{e}.down`. (`up` holds the gate's rows too, as the model stacks them.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trifold.kernels.experts.routing import route
from trifold.kernels.experts.stack import together

_FLAGS = ("is_transposed", "has_bias", "has_gate")  # what transformers writes on experts it can dispatch
_UNROUTED = "Llama4TextExperts"  # gets every token for every expert, zero where the router did not choose it


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds experts as stacked parameters of a layout that is known."""
    known = all(hasattr(module, flag) for flag in _FLAGS) or type(module).__name__ == _UNROUTED
    names = ("gate_up_proj", "down_proj") if getattr(module, "has_gate", True) else ("up_proj", "down_proj")
    return known and all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in names)


class Expert(nn.Module):
    """up (intermediate, hidden), with the gate's rows if there is one, and down (hidden, intermediate)."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor, activate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x (tokens, hidden) -> the same shape."""
        return self.down(activate(self.up(x)))


class PackedExperts(nn.Module):
    """Takes the place of a module that `is_stacked`; same arguments, same outputs.

    The linears are views of the stacked parameters until something replaces them; the stacked module itself is
    not changed. Only experts that the router chose run, and only their packed rows are read; all in one product
    where there is a kernel for that and no gradient is wanted.
    shown: experts that are to see every token, without any effect on the output; calibration wants that of
    those that too few tokens reach.
    """

    _shell: Any
    post_expert_norm: Any

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        shell = copy.copy(stacked)  # its activation and settings, not its weights
        shell._parameters = {}
        self.__dict__["_shell"] = shell
        self.routed = type(stacked).__name__ != _UNROUTED
        self.has_gate = getattr(stacked, "has_gate", True)
        transposed = getattr(stacked, "is_transposed", True)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        ups, downs = stacked.get_parameter(name), stacked.get_parameter("down_proj")
        biased = getattr(stacked, "has_bias", False)
        for e in range(len(ups)):
            up_bias = stacked.get_parameter(f"{name}_bias")[e] if biased else None
            down_bias = stacked.get_parameter("down_proj_bias")[e] if biased else None
            self.add_module(
                str(e), Expert(_linear(ups[e], up_bias, transposed), _linear(downs[e], down_bias, transposed))
            )
        self.count = len(ups)
        self.shown: frozenset[int] = frozenset()
        if getattr(stacked, "has_post_expert_norm", False):
            self.post_expert_norm = stacked.post_expert_norm
        self.train(stacked.training)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """hidden states (tokens, hidden), chosen experts (tokens, k) int64, their weights (tokens, k).

        Unrouted: hidden states (experts * tokens, hidden) alone.
        """
        x, *routing = (*args, *kwargs.values())
        return self._routed(x, *routing[:2]) if self.routed else self._unrouted(x)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if not self.routed:
            gate, up = x.chunk(2, dim=-1)
            return up * self._shell.act_fn(gate)
        return self._shell._apply_gate(x) if self.has_gate else self._shell.act_fn(x)

    def _routed(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not self._watched(x, weights) and (y := self._at_once(x, index, weights)) is not None:
            return y.view(*index.shape, -1).sum(1).to(x.dtype)
        total = torch.zeros_like(x)
        chosen = set(index.unique().tolist())
        for e in sorted((chosen | self.shown) & set(range(self.count))):
            rows, slot = torch.where(index == e)
            y = self._run(e, x, rows)
            total.index_add_(0, rows, (y * weights[rows, slot, None]).to(total.dtype))
        return total

    def _unrouted(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.view(self.count, -1, x.shape[-1])
        if not self._watched(x):
            number = torch.arange(self.count, device=x.device).unsqueeze(1)
            index = torch.where(parts.any(-1), number, self.count).view(-1, 1)
            if (y := self._at_once(x, index, None)) is not None:
                return y.to(x.dtype)
        total = torch.zeros_like(parts)
        everything = parts.sum(0)
        for e, part in enumerate(parts):
            rows = part.any(-1).nonzero().squeeze(1)
            if e in self.shown:
                shown = torch.where(part.any(-1, keepdim=True), part, everything)
                total[e, rows] = self._run(e, shown, rows)
            elif len(rows):
                total[e, rows] = self._run(e, part, rows)
        return total.view_as(x)

    def _watched(self, *given: torch.Tensor) -> bool:
        """Whether experts must run one by one: somebody wants gradients, or watches or replaces what single ones do."""
        if not len(given[0]) or self.shown:
            return True
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *self.parameters())):
            return True
        modules = [module for expert in self._experts() for module in (expert, expert.up, expert.down)]
        return any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)

    def _experts(self) -> list[Any]:
        return [self._modules[str(e)] for e in range(self.count)]

    def _at_once(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
        """x (tokens, hidden), index and weights (tokens, k) -> (tokens * k, hidden), weighted; zero where the expert
        is none of these. None if there is no kernel for all of them."""
        experts, slots = self._experts(), index.numel()
        up = together([expert.up for expert in experts], x, slots)
        down = together([expert.down for expert in experts], x, slots)
        if up is None or down is None:
            return None
        routing, normed = route(index, self.count), hasattr(self, "post_expert_norm")
        hidden = self._activate(up[0].run(up[1], x, routing, None)).to(x.dtype)
        y = down[0].run(down[1], hidden, routing, None if normed else weights)
        if not normed:
            return y
        y = self.post_expert_norm(y) * (1 if weights is None else weights.reshape(-1, 1))
        return torch.where(((index >= 0) & (index < self.count)).view(-1, 1), y, 0)

    def _run(self, e: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        expert = self.get_submodule(str(e))
        y = expert(x, self._activate)[rows] if e in self.shown else expert(x[rows], self._activate)
        return self.post_expert_norm(y) if hasattr(self, "post_expert_norm") else y


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> nn.Linear:
    weight = weight.T if transposed else weight
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def unstack(model: nn.Module, names: set[str]) -> list[str]:
    """Put `PackedExperts` in place of stacked ones wherever a name lies inside. Returns the paths."""
    paths = [path for path, module in model.named_modules() if is_stacked(module)]
    wanted = [path for path in paths if any(name.startswith(path + ".") for name in names)]
    for path in wanted:
        model.set_submodule(path, PackedExperts(model.get_submodule(path)))
    return wanted
