"""What a codec is: a canonical weight <-> the tensors that another ecosystem stores for it.

Codes, zero-points and scales go through unchanged, or not at all: what a layout cannot hold it refuses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, cast

import torch

from trifold.core.canonical import Canonical, Quantized, RoundedInput
from trifold.core.registry import Registry
from trifold.core.scheme import SCALE_DTYPES, ScaleDtype
from trifold.formats.base import describe, label

Settings = dict[str, Any]
"""What the ecosystem's config says of a weight, in its own terms."""

Tensors = Mapping[str, torch.Tensor]

_SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class Codec(ABC):
    """Pure functions; the inputs are never modified.

    name: under which it is registered. ecosystem: the `quant_method` it belongs to. codes: of its tensors the one
    that holds the codes.
    """

    name: ClassVar[str]
    ecosystem: ClassVar[str]
    codes: ClassVar[str]

    @abstractmethod
    def refusal(self, weight: Canonical, dtype: torch.dtype) -> str | None:
        """Why the weight cannot be stored exactly in a model of `dtype`; None if it can. Looks at no code."""

    @abstractmethod
    def settings(self, weight: Canonical) -> Settings:
        """What the config has to say of it."""

    @abstractmethod
    def encode(self, weight: Canonical, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of a weight that is not refused, by name below the layer. dtype: of the model."""

    @abstractmethod
    def decode(self, tensors: Tensors, settings: Settings) -> Canonical:
        """The inverse of `encode`. Codes may be on the meta device: then so are the result's.

        Raises InputError for what cannot be run, KeyError or ValueError for tensors that do not belong together.
        """

    def leaves(self, settings: Settings) -> frozenset[str]:
        """Names of tensors, below the layer, that `decode` looks at if they are there."""
        return self._leaves

    _leaves: ClassVar[frozenset[str]]


class Ecosystem(ABC):
    """The `quantization_config` of a config.json.

    method: its `quant_method`.
    """

    method: ClassVar[str]

    @abstractmethod
    def write(
        self, layers: Mapping[str, tuple[Codec, Settings]], dense: Collection[str], routers: Collection[str] = ()
    ) -> dict[str, Any]:
        """What a loader has to read. dense: linear layers that stay so. routers: of mixtures, always dense.

        Raises InputError naming the first layer that cannot be with the others.
        """

    @abstractmethod
    def read(self, config: Mapping[str, Any], tensors: Mapping[str, torch.dtype]) -> dict[str, tuple[Codec, Settings]]:
        """Codec and settings of each quantised layer. tensors: name -> dtype, of the whole checkpoint.

        Raises InputError for what is not read.
        """


CODECS: Registry[Codec] = Registry("export format")


def nearest(weight: Canonical, dtype: torch.dtype) -> str:
    """A name for `--to` that can hold the weight, `dense` if no codec does."""
    order = ("pack-quantized", "int-quantized", "float-quantized", "gptq", "gptq_v2", "awq")
    return next((name for name in order if CODECS.get(name).refusal(weight, dtype) is None), "dense")


def inner(weight: Canonical) -> Canonical:
    """The weight without what is done to its input."""
    return weight.weight if isinstance(weight, RoundedInput) else weight


def quantized(weight: Canonical) -> Quantized:
    """The same, of a weight that was not refused."""
    found = inner(weight)
    assert isinstance(found, Quantized)
    return found


def not_integers(weight: Canonical) -> str | None:
    """Why the weight is not made of integer codes and zero-points."""
    found = inner(weight)
    if not isinstance(found, Quantized):
        return f"it is {label(describe(found))}, not rounded to one grid"
    if found.scheme.table is not None:
        return f"its values are those of {found.scheme.grid}, not integers"
    if found.scheme.zero_point == "real":
        return "its zero-points are real numbers, not integers"
    if found.scheme.bits == 1 and found.scheme.symmetric:
        return "the zero of its single symmetric bit lies between the codes"
    return None


def ragged(weight: Canonical) -> str | None:
    """Why its groups are not all of one size."""
    found = quantized(weight)
    width, columns = found.scheme.group_width(found.shape[1]), found.shape[1]
    return f"groups of {width} do not divide its {columns} inputs" if columns % width else None


def inexact(scale: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why scales cannot be stored in a dtype."""
    if torch.equal(scale.to(dtype).float(), scale.float()):
        return None
    return f"its {scale_name(scale.dtype)} scales would be rounded to {scale_name(dtype)}"


def weights_only(weight: Canonical) -> str | None:
    """Why it is more than a weight."""
    return f"it rounds activations ({weight.scheme.label})" if isinstance(weight, RoundedInput) else None


def by_row(weight: Quantized) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero-points (out, groups), also of a weight with one for the whole matrix."""
    rows, zero = weight.shape[0], weight.zero_point
    if weight.scheme.group_size != "tensor":
        return weight.scale, zero
    return weight.scale.expand(rows, 1), None if zero is None else zero.expand(rows, 1)


def group_of(weight: Quantized) -> int | None:
    """Inputs that share a scale; None if all of a row do."""
    width, columns = weight.scheme.group_width(weight.shape[1]), weight.shape[1]
    return None if width == columns else width


def group_size(weight: Quantized) -> int:
    """The group size as GPTQ and AWQ write it: -1 for one scale a row, unless it is a group as wide as the row."""
    size = weight.scheme.group_size
    return size if isinstance(size, int) and size <= weight.shape[1] else -1


def scale_name(dtype: torch.dtype) -> ScaleDtype:
    """Name of a dtype of scales. Raises KeyError for another."""
    return cast(ScaleDtype, _SCALE_NAMES[dtype])
