import itertools

import pytest
import torch

from trifold.core.obs import quadratic_loss
from trifold.core.ranges import expand_groups, fit_ranges, to_codes
from trifold.core.refine import descend, refine, refit_scales
from trifold.core.scheme import Scheme


def setting(rows=5, columns=24, bits=2, group=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(64, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = x.T @ x / 64 + 0.1 * torch.eye(columns)
    scheme = Scheme(bits, group, scale_dtype="float32")
    scale, zero = fit_ranges(weight, scheme)
    wide = [expand_groups(t, weight.shape, scheme.group_width(columns)) for t in (scale, zero)]
    return weight, hessian, to_codes(weight, *wide, scheme), scale, zero, scheme


def loss(weight, hessian, codes, scale, zero, scheme):
    s, z = (expand_groups(t, weight.shape, scheme.group_width(weight.shape[1])) for t in (scale, zero))
    return float(quadratic_loss(weight.double() - ((codes - z) * s).double(), hessian.double()))


def test_each_step_lowers_the_loss():
    for seed, group in itertools.product(range(5), (8, 24, 7)):
        weight, hessian, codes, scale, zero, scheme = setting(seed=seed, group=group)
        before = loss(weight, hessian, codes, scale, zero, scheme)
        offset = expand_groups(zero, weight.shape, scheme.group_width(24))
        fitted = refit_scales(weight, hessian, codes - offset, scale, scheme)
        middle = loss(weight, hessian, codes, fitted, zero, scheme)
        wide = expand_groups(fitted, weight.shape, scheme.group_width(24))
        after = loss(weight, hessian, descend(weight, hessian, codes, wide, offset, scheme), fitted, zero, scheme)
        assert after <= middle * (1 + 1e-6) <= before * (1 + 2e-6)
        assert after < 0.9 * before


def test_refitted_scale_of_one_group_is_the_closed_form():
    weight, hessian, codes, scale, zero, scheme = setting(group=24)
    levels = codes - zero
    expected = ((weight @ hessian) * levels).sum(1) / ((levels @ hessian) * levels).sum(1)
    got = refit_scales(weight, hessian, levels, scale, scheme).squeeze(1)
    near = (expected > scale.squeeze(1) / 3) & (expected < scale.squeeze(1) * 3)
    assert near.any()
    torch.testing.assert_close(got[near], expected[near], rtol=1e-4, atol=0)


def test_descent_ends_where_no_single_code_can_improve():
    weight, hessian, codes, scale, zero, scheme = setting(rows=2, columns=6, group=6)
    for _ in range(20):
        codes = descend(weight, hessian, codes, scale.expand(2, 6), zero.expand(2, 6), scheme)
    best = loss(weight, hessian, codes, scale, zero, scheme)
    for row, column, code in itertools.product(range(2), range(6), range(4)):
        tried = codes.clone()
        tried[row, column] = code
        assert loss(weight, hessian, tried, scale, zero, scheme) >= best * (1 - 1e-6)


def test_the_block_size_of_the_descent_changes_nothing():
    weight, hessian, codes, scale, zero, scheme = setting()
    wide = [expand_groups(t, weight.shape, 8) for t in (scale, zero)]
    whole = descend(weight, hessian, codes, *wide, scheme, block=24)
    assert torch.equal(whole, descend(weight, hessian, codes, *wide, scheme, block=5))


def test_an_exactly_representable_weight_stays():
    _, hessian, codes, scale, zero, scheme = setting(bits=4)
    wide = [expand_groups(t, codes.shape, 8) for t in (scale, zero)]
    weight = (codes - wide[1]) * wide[0]
    again, same = refine(weight, hessian, codes, scale, zero, scheme, rounds=3)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("grid, bits", [("nf4", 4), ("fp4_e2m1", 4), ("fp8_e4m3", 8)])
def test_the_steps_on_a_table(grid, bits):
    """Values of the table stand in for codes; each step lowers the loss, and at the end no other value is better."""
    for seed in range(3):
        weight, hessian, _, _, _, _ = setting(rows=2, columns=6, group=6, seed=seed)
        scheme = Scheme(bits, 6, scale_dtype="float32", grid=grid)
        scale, _ = fit_ranges(weight, scheme)
        values, zero = to_codes(weight, scale.expand(2, 6), 0.0, scheme), torch.zeros(2, 1)
        before = loss(weight, hessian, values, scale, zero, scheme)
        scale = refit_scales(weight, hessian, values, scale, scheme)
        middle = loss(weight, hessian, values, scale, zero, scheme)
        for _ in range(20):
            values = descend(weight, hessian, values, scale.expand(2, 6), zero.expand(2, 6), scheme)
        after = loss(weight, hessian, values, scale, zero, scheme)
        assert after <= middle * (1 + 1e-6) <= before * (1 + 2e-6) and after < 0.95 * before
        assert torch.equal(scheme.table.snap(values), values)
        for row, column in itertools.product(range(2), range(6)):
            for value in scheme.table.values:
                tried = values.clone()
                tried[row, column] = value
                if value == value:
                    assert loss(weight, hessian, tried, scale, zero, scheme) >= after * (1 - 1e-5)
