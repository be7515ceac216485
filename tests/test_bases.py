"""Sums of signs against the errors that theory gives them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dq.bases import decode_signs, encode_signs, fit_signs, greedy_signs, signs
from dq.scales import Scales

ROWS, COLUMNS = 512, 1152


def sample(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(ROWS, 1, COLUMNS, generator=generator)
    uniform = torch.rand(ROWS, 1, COLUMNS, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def error(x: Tensor, scales: Scales) -> float:
    rounded = decode_signs(encode_signs(x, scales), scales)
    return float((x - rounded).square().sum() / x.square().sum())


def test_the_sign_of_zero_is_plus_one() -> None:
    assert signs(torch.tensor([-1e-30, -0.0, 0.0, 2.0])).tolist() == [-1, 1, 1, 1]


@pytest.mark.parametrize(("bases", "normal", "laplace"), [(1, 0.363, 0.499), (2, 0.130, 0.228)])
def test_greedy_errors_are_those_of_the_literature(
    bases: int, normal: float, laplace: float
) -> None:
    for kind, expected in (("normal", normal), ("laplace", laplace)):
        x = sample(kind)
        assert error(x, greedy_signs(x, bases)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("kind", "expected"), [("normal", 0.118), ("laplace", 0.174)])
def test_least_squares_of_two_bases(kind: str, expected: float) -> None:
    x = sample(kind)
    assert error(x, fit_signs(x, 2)) == pytest.approx(expected, rel=0.02)


def test_one_basis_is_xnor() -> None:
    x = sample("normal")
    found = fit_signs(x, 1)
    assert torch.equal(found.scale, x.abs().mean(-1))
    rounded = decode_signs(encode_signs(x, found), found)
    assert torch.equal(rounded, x.abs().mean(-1, keepdim=True) * signs(x))


@given(
    st.integers(1, 4), st.booleans(), st.integers(1, 3), st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_least_squares_are_never_worse_and_codes_are_the_nearest(
    bases: int, offset: bool, groups: int, seed: int, unit: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, groups, 24, generator=generator) + 0.3) * unit
    greedy, fitted = greedy_signs(x, bases, offset), fit_signs(x, bases, offset)
    assert error(x, fitted) <= error(x, greedy) * 1.02 + 1e-9
    codes = torch.arange(1 << bases, dtype=torch.uint8).expand(5, groups, -1)
    sums = decode_signs(codes, fitted)
    nearest = (x.unsqueeze(-1) - sums.unsqueeze(-2)).abs().amin(-1)
    found = (x - decode_signs(encode_signs(x, fitted), fitted)).abs()
    assert torch.allclose(found, nearest, atol=1e-5 * unit)


def test_an_offset_is_the_mean_of_what_is_far_from_zero() -> None:
    x = sample("normal")[:8] * 0.1 + 5
    assert error(x, fit_signs(x, 1, offset=True)) < 1e-3
    assert error(x, fit_signs(x, 1)) < 1e-3  # all signs are plus: the scale is the mean
    both = torch.cat([x, -x], -1) + 3
    assert error(both, fit_signs(both, 1, offset=True)) < 0.02 * error(both, fit_signs(both, 1))


@pytest.mark.parametrize("bases", [1, 2, 3])
@pytest.mark.parametrize("offset", [False, True])
def test_blocks_of_zeros_and_of_equal_values(bases: int, offset: bool) -> None:
    for value in (0.0, -0.7):
        x = torch.full((2, 1, 8), value)
        scales = fit_signs(x, bases, offset)
        assert all(bool(s.isfinite().all()) for s in scales if s is not None)
        rounded = decode_signs(encode_signs(x, scales), scales)
        assert (rounded - x).abs().max() < (1e-3 if value else 1e-9)
