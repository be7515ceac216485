import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.distance import cosine, mse, psnr, relative_error, sqnr

X = torch.tensor([3.0, 0.0])
REFERENCE = torch.tensor([3.0, 4.0])


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        (mse, 8.0),
        (relative_error, 0.8),
        (sqnr, 20 * math.log10(5 / 4)),
        (cosine, 0.6),
        (psnr, -10 * math.log10(8)),
    ],
)
def test_known_values(measure, value: float) -> None:
    assert measure(X, REFERENCE) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("measure", "value"),
    [(mse, 0.0), (relative_error, 0.0), (sqnr, math.inf), (cosine, 1.0), (psnr, math.inf)],
)
def test_equal_tensors(measure, value: float) -> None:
    assert measure(REFERENCE, REFERENCE) == pytest.approx(value)


def test_psnr_of_bytes_is_that_of_floats() -> None:
    a, b = torch.randint(256, (2, 3, 8, 8)).to(torch.uint8)
    assert psnr(a, b, peak=255) == pytest.approx(psnr(a / 255, b / 255), abs=1e-4)


def test_differences_below_float32_are_seen() -> None:
    a = torch.full((1000,), 1e4)
    b = a.double() + 1e-6
    assert mse(a, b) == pytest.approx(1e-12, rel=1e-3)


@given(st.floats(0.1, 100), st.integers(0, 1000))
def test_relative_measures_do_not_depend_on_the_unit(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    for measure in (relative_error, sqnr, cosine):
        assert measure(a * factor, b * factor) == pytest.approx(measure(a, b), rel=1e-9)


def test_a_zero_reference_is_infinitely_far() -> None:
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1e200
    assert sqnr(torch.ones(2), torch.zeros(2)) < -1000
