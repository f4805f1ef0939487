"""Better codes and scales for a quadratic loss, starting from some.

The loss tr((W - Q) H (W - Q)ᵀ) is quadratic in each row's scales, given the codes, and in each code, given
everything else. Alternating the two exact steps never raises it.
"""

from __future__ import annotations

import torch

from trifold.core.columns import descend_block
from trifold.core.ranges import expand_groups, round_scale
from trifold.core.scheme import Scheme

_SYSTEM_ELEMENTS = 2**22  # of the linear systems that are held at once
_TRUST = 3.0  # a refitted scale this many times larger or smaller is not believed


def refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    scheme: Scheme,
    rounds: int,
    block: int = 32,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) and scales (out, groups), float32, after alternating refit and descent.

    weight, codes: (out, in) float32. hessian: (in, in) float32, positive definite. scale, zero:
    `scheme.scale_shape`, float32; the scheme must have groups or channels. mask: (out, in) bool, false where a
    weight is zero whatever its code.
    """
    width = scheme.group_width(weight.shape[1])
    offset = expand_groups(zero, weight.shape, width)
    for _ in range(rounds):
        levels = codes - offset if mask is None else (codes - offset) * mask
        scale = refit_scales(weight, hessian, levels, scale, scheme)
        expanded = expand_groups(scale, weight.shape, width)
        codes = descend(weight, hessian, codes, expanded, offset, scheme, block, mask)
    return codes, scale


def refit_scales(
    weight: torch.Tensor, hessian: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """The scales with the least loss for given levels (code - zero_point), (out, groups), as stored.

    One linear system per row. Where it is singular or its solution far away, the old scale stays; a row whose
    loss would not fall (scales are stored rounded) keeps all of them.
    """
    rows = max(1, _SYSTEM_ELEMENTS // scale.shape[1] ** 2)
    if len(weight) > rows:
        parts = zip(weight.split(rows), levels.split(rows), scale.split(rows), strict=True)
        return torch.cat([refit_scales(w, hessian, part, s, scheme) for w, part, s in parts])
    columns, width = weight.shape[1], scheme.group_width(weight.shape[1])
    starts = range(0, columns, width)
    right = _group_sums((weight @ hessian).mul_(levels), width)
    system = torch.empty(len(weight), len(starts), len(starts), dtype=torch.float64, device=weight.device)
    for j, b in enumerate(starts):  # each row is symmetric
        product = levels[:, b : b + width] @ hessian[b : b + width, b:]
        system[:, j:, j] = system[:, j, j:] = _group_sums(product.mul_(levels[:, b:]), width)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    damped = system + ridge[:, None, None] * torch.eye(len(starts), dtype=torch.float64, device=weight.device)
    solution = torch.linalg.solve_ex(damped, right.double().unsqueeze(-1))[0].squeeze(-1).float()
    believed = (solution > scale / _TRUST) & (solution < scale * _TRUST)
    new = round_scale(torch.where(believed, solution, scale), scheme)

    def loss(s: torch.Tensor) -> torch.Tensor:
        s = s.double()
        return (torch.einsum("nij,nj->ni", system, s) * s).sum(1) - 2 * (right.double() * s).sum(1)

    return torch.where((loss(new) < loss(scale))[:, None], new, scale)


def _group_sums(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, in) -> (rows, groups)."""
    short = -matrix.shape[1] % width
    matrix = torch.nn.functional.pad(matrix, (0, short)) if short else matrix  # which would copy even for nothing
    return matrix.unflatten(1, (-1, width)).sum(-1)


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    scheme: Scheme,
    block: int = 32,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass of coordinate descent over the columns: each code becomes the best one given all others.

    The loss is a parabola in one weight, so the best value of any grid is the one nearest to its minimum. All
    (out, in) float32, scale and offset per weight; hessian (in, in). mask: as for `refine`. Returns the new codes.
    """
    codes, scale, offset = (t.T.contiguous() for t in (codes, scale, offset))
    value = (codes - offset) * scale
    error = weight.T - (value if mask is None else value.mul_(mask.T))  # (in, out)
    step = (scale * hessian.diagonal()[:, None]).reciprocal_()
    if mask is not None:
        step.masked_fill_(~mask.T, 0.0)  # what is zero stays where it is
    moves = torch.empty(block, len(weight), dtype=error.dtype, device=error.device)
    for start in range(0, len(codes), block):
        part = slice(start, min(start + block, len(codes)))
        moved = moves[: part.stop - start].zero_()
        given = (codes[part], hessian[part] @ error, step[part], scale[part], moved, hessian[part, part])
        if scheme.table is not None or not descend_block(*given, scheme.max_code):
            _descend_block(*given, scheme)
        error[part] -= moved
    return codes.T.contiguous()


def _descend_block(
    codes: torch.Tensor,
    slopes: torch.Tensor,
    step: torch.Tensor,
    scale: torch.Tensor,
    moved: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
) -> None:
    along, table = moved.T, scheme.table
    for code, slope, inverse, size, move, column in zip(
        codes, slopes, step, scale, moved, hessian.unbind(1), strict=True
    ):
        pull = torch.addmv(slope, along, column, alpha=-1)  # what is not decided yet has moved by nothing
        new = torch.addcmul(code, pull, inverse)
        new = new.round_().clamp_(0, scheme.max_code) if table is None else table.snap(new)
        torch.sub(new, code, out=move).mul_(size)
        code.copy_(new)
