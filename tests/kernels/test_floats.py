"""The tables of kernels and the arithmetic of `dq.formats` are the same formats."""

import pytest
import torch

from dq.formats import FloatFormat, formats
from dq.kernels.floats import as_e4m3, decode, encode, fields

E4M3 = formats["e4m3"]
# Those with a name in the field, and every other split of the bits.
EVERY = [f"{u}e{e}m{m}" for u in ("", "u") for e in range(1, 8) for m in range(7)]
FLOATS = [name for name in EVERY if name in formats and name != "e5m2"]  # e5m2 has infinities
CONTAINED = [n for n in FLOATS if bool(torch.isin(formats[n].levels, E4M3.levels).all())]


def numbers(grid: FloatFormat) -> torch.Tensor:
    """Levels, ties, what lies next to them, and random ones from far below to far above."""
    middles = (grid.levels[1:] + grid.levels[:-1]) / 2
    exact = torch.cat([grid.levels, middles, torch.tensor([0.0, -0.0, 1e30, -1e30])])
    around = [torch.nextafter(exact, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    sizes = torch.logspace(-4, 1, 6) * grid.high
    return torch.cat([exact, *around, (torch.randn(500, 6) * sizes).flatten()])


def test_the_named_ones_are_among_them() -> None:
    assert {"e2m1", "e2m3", "e3m2", "e4m3"} <= set(CONTAINED)
    assert "ue4m3" not in CONTAINED  # reaches 480


@pytest.mark.parametrize("name", FLOATS)
def test_codes_and_levels_are_those_of_the_format(name: str) -> None:
    grid = formats[name]
    assert isinstance(grid, FloatFormat)
    f = fields(name)
    assert (f.bits, f.high, f.emax) == (grid.bits, grid.high, grid.emax)
    assert (f.exponent, f.mantissa, f.signed) == (grid.exponent, grid.mantissa, grid.signed)
    x = numbers(grid)
    codes = encode(x, name)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, grid.encode(x))
    assert torch.equal(decode(codes, name), grid.decode(codes))
    assert torch.equal(decode(codes, name).signbit(), grid.decode(codes).signbit())


@pytest.mark.parametrize("name", CONTAINED)
def test_bytes_of_e4m3_stand_for_the_same_numbers(name: str) -> None:
    grid = formats[name]
    codes = grid.encode(grid.levels).view(1, -1)
    levels = as_e4m3(codes, name)
    assert levels.dtype == torch.float8_e4m3fn
    assert torch.equal(levels.float(), grid.levels.view(1, -1))
    assert torch.equal(levels.view(torch.uint8), E4M3.encode(grid.levels).view(1, -1))
