import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.errors import DQError
from dq.formats import FloatFormat, IntFormat, formats

# Floats of any fields are made when asked for; these stand for all.
MADE = ("e3m0", "e1m2", "e2m2", "e3m4", "e2m5", "e5m0", "ue2m2", "ue3m1", "ue4m4", "ue5m3")
ALL = [entry for _, entry in formats.items()] + [formats[name] for name in MADE]
INTS = [entry for entry in ALL if isinstance(entry, IntFormat)]
FLOATS = [entry for entry in ALL if isinstance(entry, FloatFormat)]
ORACLES = {  # second opinions, written by others
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
}

TINY = torch.finfo(torch.float32).tiny  # below it, both round powers of two up, near or not

each = pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.name)
each_oracle = pytest.mark.parametrize("grid", [formats[n] for n in ORACLES], ids=list(ORACLES))
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


def trials(grid) -> torch.Tensor:
    """All levels, all midpoints, their neighbours in float32, random values of every size."""
    known = grid.levels
    middles = (known[1:] + known[:-1]) / 2
    centres = torch.cat([known, middles, torch.tensor([0.0, -0.0])])
    up = torch.nextafter(centres, torch.tensor(torch.inf))
    down = torch.nextafter(centres, torch.tensor(-torch.inf))
    spread = torch.randn(4000) * torch.exp2(torch.randint(-20, 18, (4000,)).float())
    x = torch.cat([centres, up, down, spread])
    reach = max(-grid.low, grid.high)
    return x[(x >= (grid.low if grid.low > 0 else -reach)) & (x <= reach)]


@each
def test_names_are_their_own(grid) -> None:
    assert formats[grid.name] == grid
    assert 1 <= grid.bits <= 8


@each
def test_every_level_round_trips(grid) -> None:
    known = grid.levels
    assert (known[0], known[-1]) == (grid.low, grid.high)
    codes = grid.encode(known)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << grid.bits
    assert len(codes.unique()) == len(known)
    assert torch.equal(grid.decode(codes), known)


@each
def test_the_nearest_level_is_taken(grid) -> None:
    x, known = trials(grid), grid.levels
    nearest = (x.double()[:, None] - known.double()).abs().amin(1)
    chosen = (x.double() - grid.round(x).double()).abs()
    assert torch.equal(chosen, nearest)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_is_decode_of_encode_and_keeps_the_dtype(grid, dtype: torch.dtype) -> None:
    x = torch.randn(2000).mul(grid.high).to(dtype)
    rounded = grid.round(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, grid.decode(grid.encode(x)).to(dtype))


@each
def test_arguments_are_not_changed(grid) -> None:
    x = torch.randn(100) * grid.high * 2
    before = x.clone()
    grid.encode(x), grid.round(x)
    assert torch.equal(x, before)


@given(st.sampled_from(ALL), numbers)
def test_rounding_is_idempotent(grid, value: float) -> None:
    once = grid.round(torch.tensor([value]))
    assert torch.equal(grid.round(once), once)


@given(st.sampled_from(ALL), numbers, numbers)
def test_rounding_is_monotonic(grid, a: float, b: float) -> None:
    low, high = grid.round(torch.tensor([min(a, b), max(a, b)]))
    assert low <= high


@each
def test_values_beyond_the_grid_saturate(grid) -> None:
    far = torch.tensor([grid.high * 1.01, grid.high * 1e6, 3e38])
    assert (grid.round(far) == grid.high).all()
    assert (grid.round(torch.tensor([grid.low - 0.6, -1e30, -3e38])) == grid.low).all()


@pytest.mark.parametrize("grid", INTS, ids=lambda grid: grid.name)
def test_integers_are_consecutive_and_ties_go_to_the_even_one(grid) -> None:
    assert grid.is_integer
    known = grid.levels
    assert torch.equal(known, torch.arange(grid.low, grid.high + 1).float())
    assert torch.equal(grid.decode(torch.tensor([0], dtype=torch.uint8)), known[:1])
    middles = known[:-1] + 0.5
    assert (grid.round(middles) % 2 == 0).all()


@each_oracle
def test_formats_agree_with_ml_dtypes_bit_for_bit(grid) -> None:
    x = trials(grid)
    x = x[x >= TINY] if grid.low > 0 else x
    oracle = x.numpy().astype(ORACLES[grid.name])
    assert np.array_equal(grid.encode(x).numpy(), oracle.view(np.uint8))
    assert np.array_equal(grid.round(x).numpy(), oracle.astype(np.float32))


@each_oracle
def test_all_float_codes_decode_as_in_ml_dtypes(grid) -> None:
    codes = np.arange(1 << grid.bits, dtype=np.uint8)
    expected = codes.view(ORACLES[grid.name]).astype(np.float32)
    finite = np.isfinite(expected)
    decoded = grid.decode(torch.from_numpy(codes)).numpy()
    assert np.array_equal(decoded[finite], expected[finite])
    assert np.abs(expected[finite]).max() == grid.high
    assert np.array_equal(np.signbit(decoded[finite]), np.signbit(expected[finite]))


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formats_agree_with_torch_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    grid = formats[name]
    x = trials(grid).to(dtype)
    values = x.float()
    x = x[(values >= (TINY if grid.low > 0 else grid.low)) & (values <= grid.high)]
    assert torch.equal(grid.encode(x), x.to(TORCH[name]).view(torch.uint8))
    codes = torch.arange(256).to(torch.uint8)
    expected = codes.view(TORCH[name]).float()
    finite = expected.isfinite()
    assert torch.equal(grid.decode(codes)[finite], expected[finite])


def test_every_named_float_format_has_a_second_opinion() -> None:
    named = {name for name, grid in formats.items() if isinstance(grid, FloatFormat)}
    assert named <= set(ORACLES)


def test_e3m4_agrees_with_ml_dtypes_below_its_infinities() -> None:
    grid = formats["e3m4"]
    x = trials(grid)
    x = x[x.abs() <= 15.5]  # theirs keeps the last exponent for infinity and NaN
    oracle = x.numpy().astype(ml_dtypes.float8_e3m4)
    assert np.array_equal(grid.encode(x).numpy(), oracle.view(np.uint8))


@each
def test_neighbours_enclose_each_value(grid) -> None:
    x = trials(grid).clamp(grid.low, grid.high)
    below, above = grid.around(x)
    assert ((below <= x) & (x <= above)).all()
    gaps = torch.searchsorted(grid.levels, above) - torch.searchsorted(grid.levels, below)
    assert torch.equal(gaps, (x != below).long())
    nearest = grid.round(x)
    assert ((nearest == below) | (nearest == above)).all()


@pytest.mark.parametrize("name", ["e0m3", "e4m4", "ue5m4", "e8m0x", "u", "e0m0", "ue1m0"])
def test_what_is_no_float_of_8_bits_is_refused(name: str) -> None:
    assert name not in formats
    with pytest.raises(DQError, match="unknown format"):
        formats[name]


def test_the_sign_of_zero_is_plus_one_in_binary() -> None:
    assert formats["binary"].round(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [-1, 1, 1]
    ties = torch.tensor([-0.5, 0.5])
    assert formats["ternary"].round(ties).tolist() == [0, 1]


@each
def test_formats_can_be_copied_and_compared(grid) -> None:
    grid.round(torch.zeros(1))  # a cached table must not get in the way
    assert copy.deepcopy(grid) == grid
    assert hash(copy.deepcopy(grid)) == hash(grid)
