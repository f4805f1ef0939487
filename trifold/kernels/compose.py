"""Products with weights put together from parts: each part brings its own op."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from trifold.core.product import Product, chain_product, split_order, split_product, sum_product
from trifold.formats.base import Spec
from trifold.formats.nested import pack_index, unpack_index
from trifold.kernels.native.place import place
from trifold.kernels.op import Runtime, Tensors


class Composition(Runtime, ABC):
    """What a nested format does with the products of its parts."""

    @abstractmethod
    def combine(self, x: torch.Tensor, tensors: Tensors, spec: Spec, parts: Sequence[Product]) -> torch.Tensor:
        """x (M, in) -> (M, out). tensors: the weight's own, without those of parts, as `prepare` returned them; none of
        what does not replace them."""


class Split(Composition):
    """The index is kept as the order of rows or columns that it stands for, and the places of rows."""

    name = "split"
    replaces = True

    def prepare(self, tensors: Tensors, spec: Spec) -> Tensors:
        index = unpack_index(tensors["weight"], spec)
        places = {"places": torch.argsort(index, stable=True)} if spec["axis"] == 0 else {}
        return {"order": split_order(spec["axis"], index), **places}

    def restore(self, tensors: Tensors, spec: Spec) -> Tensors:
        order = tensors["order"]
        widths = torch.tensor(heights(spec), device=order.device)
        numbers = torch.arange(len(widths), device=order.device).repeat_interleave(widths)
        index = numbers[order] if spec["axis"] == 0 else torch.empty_like(numbers).index_copy_(0, order, numbers)
        return {"weight": pack_index(index, spec)}

    def combine(self, x: torch.Tensor, tensors: Tensors, spec: Spec, parts: Sequence[Product]) -> torch.Tensor:
        if "places" in tensors and not (torch.is_grad_enabled() and x.requires_grad):
            return self._joined([part(x) for part in parts], tensors["places"], spec)
        return split_product(x, spec["axis"], tensors["order"], heights(spec), parts)

    def _joined(self, outputs: Sequence[torch.Tensor], places: torch.Tensor, spec: Spec) -> torch.Tensor:
        y = outputs[0].new_empty(outputs[0].shape[0], spec["shape"][0])
        for output, own in zip(outputs, places.split(heights(spec)), strict=True):
            place(output, own, y)
        return y


def heights(spec: Spec) -> list[int]:
    """Rows, or columns, of the parts of a split."""
    return [part["shape"][spec["axis"]] for part in spec["parts"]]


class Sum(Composition):
    name = "sum"

    def combine(self, x: torch.Tensor, tensors: Tensors, spec: Spec, parts: Sequence[Product]) -> torch.Tensor:
        return sum_product(x, parts)


class Chain(Composition):
    name = "chain"

    def combine(self, x: torch.Tensor, tensors: Tensors, spec: Spec, parts: Sequence[Product]) -> torch.Tensor:
        return chain_product(x, parts)


COMPOSITIONS: dict[str, Composition] = {kind.name: kind for kind in (Split(), Sum(), Chain())}
"""By format."""
