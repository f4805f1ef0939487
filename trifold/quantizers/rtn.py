"""Round to nearest: the baseline that every other quantiser has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifold.core.canonical import Quantized
from trifold.core.method import METHODS, Bounds, LayerMethod, LayerProblem, LayerSolution
from trifold.core.ranges import Ranges, expand_groups, fit_ranges, rows_at_once, to_codes, to_stored
from trifold.core.rounding import quantized
from trifold.core.scheme import Scheme


def round_to_nearest(weight: torch.Tensor, bounds: Bounds, scheme: Scheme) -> Quantized:
    """weight (out, in) float32 -> the nearest codes within the given ranges."""
    width = scheme.group_width(weight.shape[1])
    scale, zero = bounds
    zero = torch.full_like(scale, scheme.midpoint) if zero is None else zero
    rows = rows_at_once(weight.shape[1])
    slabs = [m.split(rows) for m in (weight, *(b.expand(len(weight), -1) for b in (scale, zero)))]
    codes = []
    for slab, s, z in zip(*slabs, strict=True):
        s, z = (expand_groups(b, slab.shape, width) for b in (s, z))
        codes.append(to_stored(to_codes(slab, s, z, scheme), scheme))
    return quantized(torch.cat(codes), bounds, scheme)


@METHODS.register("rtn")
@dataclass(frozen=True)
class RTN(LayerMethod):
    """Each weight to its nearest code; no calibration.

    ranges: "minmax" covers each group's extremes; "mse" searches the range with the least error.
    """

    ranges: Ranges = "mse"

    def solve(self, problem: LayerProblem) -> LayerSolution:
        canonical = {}
        for name, weight in problem.weights.items():
            scheme = problem.schemes[name]
            bounds = problem.bounds.get(name) or fit_ranges(weight, scheme, self.ranges)
            canonical[name] = round_to_nearest(weight, bounds, scheme)
        return LayerSolution(canonical)
