import itertools
import math

import pytest
import torch

from trifold.core.errors import RecipeError
from trifold.core.ranges import fit_ranges, from_bounds, to_codes, to_stored
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.core.tables import TABLES, Table

NF4, FP4, FP8 = (TABLES.get(name) for name in ("nf4", "fp4_e2m1", "fp8_e4m3"))
GRIDS = [("nf4", 4), ("fp4_e2m1", 4), ("fp8_e4m3", 8)]


def finite(table):
    """Codes that stand for a number, with their numbers."""
    pairs = [(code, value) for code, value in enumerate(table.values) if not math.isnan(value)]
    codes, values = zip(*pairs, strict=True)
    return torch.tensor(codes, dtype=torch.uint8), torch.tensor(values)


def test_the_values_of_the_literature():
    nf4 = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
    assert NF4.values == pytest.approx(nf4, abs=1e-7)
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert list(FP4.values) == [*half, *(-value for value in half)]
    torch_values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.tensor(FP8.values).nan_to_num(9e9), torch_values.nan_to_num(9e9))
    for byte, value in ((0x38, 1), (0x3C, 1.5), (0x76, 224), (0x7E, 448), (0x18, 2**-4), (0x01, 2**-9)):
        assert FP8.values[byte] == value
    assert (NF4.largest, FP4.largest, FP8.largest) == (1, 6, 448)


@pytest.mark.parametrize("table", [NF4, FP4, FP8], ids=["nf4", "fp4", "fp8"])
def test_every_code_is_found_again(table):
    codes, values = finite(table)
    assert torch.equal(table.decode(codes), values)
    assert torch.equal(table.snap(values), values)
    again = table.encode(values)
    assert torch.equal(table.decode(again), values)
    different = codes[again != codes]
    assert different.tolist() == ([8] if table is FP4 else [])  # its negative zero


@pytest.mark.parametrize("table", [NF4, FP4, FP8], ids=["nf4", "fp4", "fp8"])
def test_the_nearest_value_by_exhaustion(table):
    _, values = finite(table)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(3000, generator=generator) * size for size in (0.01, 0.3, 1, 5, 300)])
    distance = (x[:, None].double() - values.double()).abs()
    assert torch.equal((x.double() - table.snap(x).double()).abs(), distance.amin(1))


@pytest.mark.parametrize("table", [FP4, FP8], ids=["fp4", "fp8"])
def test_halfway_goes_to_the_even_code(table):
    _, values = finite(table)
    ascending = values.unique()
    middle = (ascending[1:] + ascending[:-1]) / 2
    codes = table.encode(table.snap(middle))
    assert (codes % 2 == 0).all()
    lower, upper = table.encode(ascending[:-1]), table.encode(ascending[1:])
    assert ((codes == lower) | (codes == upper) | (table.decode(codes) == 0)).all()


def test_floats_round_as_the_card_says():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75, -5.0, -1e9])
    assert FP4.snap(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1, -4, -6]


def test_fp8_rounds_as_torch_casts_and_saturates():
    _, values = finite(FP8)
    ascending = values.unique()
    middle = (ascending[1:] + ascending[:-1]) / 2
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(5000, generator=generator) * s for s in (1e-3, 0.1, 10, 200)] + [middle, values])
    x = torch.cat([x, torch.tensor([1e9, -1e9, 3e38, 464.0, 465.0, 1e-45, -0.0])])
    cast = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(FP8.snap(x), cast.float())
    assert torch.equal(FP8.encode(FP8.snap(x)), cast.view(torch.uint8))  # to the byte, negative zero included
    assert not ((FP8.encode(FP8.snap(x)) & 127) == 127).any()
    by_search = Table(8, FP8.values)  # the same numbers, without torch's help
    assert torch.equal(by_search.snap(x), cast.float())


def test_nf4_breaks_ties_downwards():
    ascending = torch.tensor(NF4.values)
    middle = ((ascending[1:].double() + ascending[:-1].double()) / 2).float()
    assert torch.equal(NF4.snap(middle), ascending[:-1])
    assert torch.equal(NF4.snap(torch.nextafter(middle, torch.ones(15))), ascending[1:])


def test_nf4_by_hand():
    scheme = Scheme(4, 64, scale_dtype="float32", grid="nf4")
    weight = torch.tensor([[0.3, -1.2, 0.75, 0.1]])
    scale, zero = fit_ranges(weight, scheme)
    levels = to_codes(weight, scale, scheme.midpoint, scheme)
    assert scale.item() == pytest.approx(1.2) and zero is None
    assert to_stored(levels, scheme).tolist() == [[10, 0, 13, 8]]
    assert (levels * scale).tolist()[0] == pytest.approx([0.2953348, -1.2, 0.675140, 0.0954964], abs=1e-6)


def test_nvfp4_toy_codes():
    """The codes of the usual example, with the step that its two-level scale comes to."""
    x = [0.02, -0.11, 0.33, 0.07, -0.5, 0.9, -1.3, 0.4, 0.01, 0.15, -0.25, 0.6, 1, -0.75, 0.05, -0.3]
    values = [0, -0.5, 1.5, 0.5, -2, 4, -6, 2, 0, 0.5, -1, 3, 4, -3, 0, -1.5]
    back = FP4.snap(torch.tensor(x) / 0.2166667)
    assert back.tolist() == values
    assert (back * 0.2166667 - torch.tensor(x)).square().mean().item() == pytest.approx(0.0028071, rel=1e-4)


@pytest.mark.parametrize("grid, bits", GRIDS)
def test_the_scale_covers_the_largest_magnitude(grid, bits):
    scheme = Scheme(bits, "channel", scale_dtype="float32", grid=grid)
    scale, zero = from_bounds(torch.tensor([-3.0, 1.0]), torch.tensor([2.0, 5.0]), scheme)
    assert zero is None
    assert torch.allclose(scale * scheme.table.largest, torch.tensor([3.0, 5.0]))


@pytest.mark.parametrize("grid, bits", GRIDS)
@pytest.mark.parametrize("dtype", sorted(SCALE_DTYPES))
@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_no_finite_weight_gives_a_code_without_a_number(grid, bits, dtype, ranges):
    rows = [[3e38, -3e38, 0, 1], [1e-45, -1e-45, 0, 0], [1e5] * 4, [-1e-30, 0, 1e-38, 0], [0] * 4, [7.0] * 4]
    weight, scheme = torch.tensor(rows), Scheme(bits, 3, scale_dtype=dtype, grid=grid)
    scale, _ = fit_ranges(weight, scheme, ranges)
    wide = scale.repeat_interleave(3, dim=1)[:, :4]
    codes = to_stored(to_codes(weight, wide, 0.0, scheme), scheme)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.isfinite(scheme.table.decode(codes)).all()
    assert not scheme.table.decode(codes)[4].any()


@pytest.mark.parametrize("grid, bits", GRIDS)
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4, 4.0])
def test_the_search_is_never_worse_than_the_extremes(grid, bits, norm):
    weight = torch.randn(7, 43, generator=torch.Generator().manual_seed(0))
    scheme, score = Scheme(bits, "channel", grid=grid), {}
    for ranges in ("minmax", "mse"):
        scale, _ = fit_ranges(weight, scheme, ranges, norm=norm)
        error = to_codes(weight, scale, 0.0, scheme) * scale - weight
        score[ranges] = error.abs().pow(norm).sum(1)
    assert (score["mse"] <= score["minmax"] * (1 + 1e-5)).all()


def test_normal_weights_like_the_normal_grid():
    """In blocks of 64, NF4 loses less than 4-bit floats and symmetric integers do; FP8 far less than any."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = {}
    for scheme in (Scheme(4, 64, True), *(Scheme(bits, 64, grid=grid) for grid, bits in GRIDS)):
        scale, _ = fit_ranges(weight, scheme)
        wide = scale.repeat_interleave(64, dim=1)
        back = (to_codes(weight, wide, scheme.midpoint, scheme) - scheme.midpoint) * wide
        error[scheme.grid] = float((back - weight).square().mean())
    assert error["nf4"] < 0.8 * min(error["int"], error["fp4_e2m1"])
    assert error["fp8_e4m3"] < 0.1 * error["nf4"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grid": "nf5"}, "unknown grid 'nf5'; did you mean nf4"),
        ({"grid": "nf4", "bits": 3}, "grid='nf4' has 4 bits, not bits=3"),
        ({"grid": "fp8_e4m3"}, "grid='fp8_e4m3' has 8 bits, not bits=4"),
        ({"grid": "nf4", "zero_point": "real"}, "with grid='nf4' there is none"),
        ({"symmetric": True, "zero_point": "real"}, "with symmetric=true there is none"),
        ({"zero_point": "float"}, "zero_point='float' is neither"),
    ],
)
def test_impossible_grids(settings, message):
    with pytest.raises(RecipeError, match=message):
        Scheme(**settings)


def test_a_table_is_symmetric():
    assert Scheme(4, grid="nf4") == Scheme(4, grid="nf4", symmetric=True)
    assert Scheme(4, grid="nf4").midpoint == 0 and Scheme(4).table is None


def test_devices_and_shapes_do_not_matter():
    for table, shape in itertools.product((NF4, FP4, FP8), [(0,), (1,), (3, 5), (2, 3, 4)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert table.snap(x).shape == table.encode(table.snap(x)).shape == shape
        assert torch.equal(table.decode(table.encode(table.snap(x))), table.snap(x))
        assert torch.equal(
            table.snap(x.mT if x.dim() > 1 else x), table.snap(x.contiguous()).mT if x.dim() > 1 else table.snap(x)
        )
