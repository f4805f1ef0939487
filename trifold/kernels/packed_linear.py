"""A linear layer that runs on its packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trifold.core.inputs import InputScheme
from trifold.core.product import Product
from trifold.formats.base import Spec
from trifold.kernels.compose import COMPOSITIONS
from trifold.kernels.dispatch import Choice, explain, resolve
from trifold.kernels.low_rank.fused import fused
from trifold.kernels.native.stages import bind
from trifold.kernels.op import Op
from trifold.kernels.rows import row_blocks
from trifold.kernels.shared_input import SharedInput
from trifold.kernels.staged import Staged, staged
from trifold.kernels.storage import PackedModule


class PackedLinear(PackedModule):
    """x Wᵀ + b with a packed W.

    spec: the JSON of a format, with `shape` (out, in); an `input` such as {"bits": 8} means that activations
    are rounded first. A weight made of `parts` runs each of them with an op of its own. bias_dtype: of the bias,
    a parameter without gradient. The tensors are empty, on the default device, until they are loaded. No dense
    copy of the weight is ever kept.

    beside: what computes it together with others that are given the same tensor; None if there are none.
    """

    beside: SharedInput | None = None

    def __init__(self, spec: Spec, bias: bool, bias_dtype: torch.dtype) -> None:
        super().__init__(spec)
        InputScheme(**(spec.get("input") or {}))  # raises for an impossible one
        self.out_features, self.in_features = (int(size) for size in spec["shape"])
        values = torch.empty(self.out_features, dtype=bias_dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))
        self._ops: dict[tuple[torch.dtype, torch.device], Op] = {}
        self._products: list[Product] | None = None  # with the parts, once they were needed
        self._stages: dict[torch.dtype, tuple[Staged, Any] | None] = {}

    def _part(self, spec: Spec) -> PackedLinear:
        return PackedLinear(spec, False, torch.get_default_dtype())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in), any float dtype -> (..., out), of the same dtype also under autocast.

        Raises ValueError if x has another number of features, TypeError if it is not floating point.
        """
        beside = self.beside
        if beside is not None and not torch.compiler.is_compiling() and (y := beside.output(self, x)) is not None:
            return y
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, the layer takes {self.in_features}")
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return PackedLinear.forward(self, x)
        y = self.multiply(x.reshape(-1, self.in_features), self._parameters["bias"])
        return y.reshape(*x.shape[:-1], self.out_features)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (M, in) -> x Wᵀ + bias, (M, out), without the module's own bias."""
        if "parts" in self.spec:
            return self._composed(x, bias)
        learns = x.requires_grad or (bias is not None and bias.requires_grad)
        return _Product.apply(x, bias, self) if learns else self._product(x, bias)

    def _composed(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        if not (torch.is_grad_enabled() and bias is not None and bias.requires_grad):
            y = fused(self, x, bias)
            if y is None:
                y = self._in_stages(x, bias)
            if y is not None:
                return y
        composition = COMPOSITIONS[self.spec["format"]]
        if self._products is None:
            parts: Any = self.parts
            self._products = [_same if part.spec["format"] == "identity" else part.multiply for part in parts]
        tensors = self._tensors_for(composition) if composition.replaces else {}
        y = composition.combine(x, tensors, self.spec, self._products)
        return y if bias is None else y + bias.to(y.dtype)

    def stages(self, dtype: torch.dtype) -> Staged | None:
        """The layer as products in two stages, for activations of `dtype` on a CPU; None if it cannot be that."""
        found = self._staged(dtype)
        return None if found is None else found[0]

    def _staged(self, dtype: torch.dtype) -> tuple[Staged, Any] | None:
        """The same, and the call."""
        found = self._stages.get(dtype)
        if dtype not in self._stages or not (found is None or found[0].holds()):
            made = staged(self, dtype)
            found = self._stages[dtype] = None if made is None else (made, bind([made.layer], made.variant))
        return found

    def _in_stages(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """multiply, of a weight made of parts, if it can be done that way."""
        if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return None
        plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
        found = self._staged(x.dtype) if plain else self._stages.get(x.dtype)
        if found is None or x.shape[0] > found[0].most or not (plain or found[0].holds()):
            return None
        bias = None if bias is None else bias.to(x.dtype)
        if plain:
            y: torch.Tensor = found[1](x.contiguous(), [None if bias is None else bias.contiguous()])[0]
            return y
        layer = found[0].layer
        compiled: torch.Tensor = torch.ops.trifold.staged_linear(x, bias, layer.tensors, layer.layout, found[0].variant)
        return compiled

    def op(self, x: torch.Tensor) -> Op:
        """What runs activations of x's dtype on its device."""
        return self.op_for(x.dtype, x.device)

    def op_for(self, dtype: torch.dtype, device: torch.device) -> Op:
        key = (dtype, device)
        if key not in self._ops:
            self._ops[key] = resolve(self.spec, dtype, device)
        return self._ops[key]

    def choice(self, dtype: torch.dtype, device: torch.device | str) -> Choice:
        """Which op runs activations of `dtype` on `device`, and why none that is preferred to it."""
        return explain(self.spec, dtype, device)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        bias = None if bias is None else bias.to(x.dtype)
        if type(x) is not torch.Tensor or torch.compiler.is_compiling():
            op = self.op(x)
            return op.run(x, self._tensors_for(op), self.spec, bias)
        bound = self._bound
        if bound is None or bound[0] != x.dtype or bound[1] != x.device:
            op = self.op(x)
            bound = x.dtype, x.device, op.bind(self._tensors_for(op), self.spec)
            if self._holder is op:
                self._bound = bound
        return bound[2](x, bias)

    def _input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """grad (M, out) -> grad W, (M, in), summed over blocks of rows in at least float32."""
        op = self.op(grad)
        tensors = self._tensors_for(op)
        total = grad.new_zeros(len(grad), self.in_features, dtype=torch.promote_types(grad.dtype, torch.float32))
        for start, stop in row_blocks(self.out_features, self.in_features, grad.device):
            total += grad[:, start:stop] @ op.rows(tensors, self.spec, start, stop, grad.dtype)
        return total.to(grad.dtype)

    def _restore(self) -> None:
        if self.__dict__.get("_stages"):  # they hold the runtime tensors
            self._stages = {}
            if self.beside is not None:
                self.beside.forget()
        super()._restore()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ops": {}, "_products": None, "_stages": {}}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


class _Product(torch.autograd.Function):
    """Keeps the module, not a dense weight, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: PackedLinear) -> torch.Tensor:
        ctx.module = module
        return module._product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x = ctx.module._input_gradient(grad) if ctx.needs_input_grad[0] else None
        return x, grad.sum(0) if ctx.needs_input_grad[1] else None, None
