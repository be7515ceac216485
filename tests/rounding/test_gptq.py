import numpy as np
import pytest
import torch

from dq.formats import formats
from dq.quantize import quantize
from dq.rounding.gptq import gptq
from dq.rounding.grid import spread
from dq.spec import TensorSpec
from tests.rounding.cases import (
    COLUMNS,
    EVERY,
    NARROW,
    SUMS,
    each,
    gain,
    inputs,
    moment_of,
    narrow,
    scaled,
)


@each
def test_it_beats_the_nearest_levels_on_inputs_that_it_has_not_seen(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = gptq(w, scales, spec, moment_of(inputs()))
    assert codes.dtype == torch.uint8
    assert codes.shape == w.shape
    assert torch.equal(spec.grid.encode(spec.grid.decode(codes)), codes)  # none that is not a level
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > 3


@pytest.mark.parametrize("spec", SUMS, ids=str)
def test_sums_of_signs_are_rounded_as_wholes(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    nearest = quantize(w, scales, spec)
    assert torch.equal(gptq(w, scales, spec, torch.eye(COLUMNS)), nearest)
    assert gain(gptq(w, scales, spec, moment_of(inputs())), nearest, w, scales, spec) > 3


@each
def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    assert torch.equal(gptq(w, scales, spec, torch.eye(COLUMNS)), quantize(w, scales, spec))


@narrow
@pytest.mark.parametrize("last", [0.0, 1e-6, 1e6])
def test_so_do_inputs_of_any_size(spec: TensorSpec, last: float) -> None:
    w, scales = scaled(spec)
    sizes = torch.diag(torch.linspace(0.0, last, COLUMNS))
    assert torch.equal(gptq(w, scales, spec, sizes), quantize(w, scales, spec))


def literal(
    w: np.ndarray, levels: np.ndarray, step: np.ndarray, codes: np.ndarray, moment: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Follow the published algorithm in float64, column by column, and say what it meets.

    Optimal brain quantization (Frantar and Alistarh 2022, equations 2 and 4, which GPTQ computes
    with Cholesky factors): the error of a column over the diagonal of the inverse goes to all
    columns that are left, and the column is eliminated from the inverse. Codes are given, so that
    a tie that falls otherwise changes one column and not all that follow.

    Args:
        w: `(N, K)`.
        levels: Of the grid, less the zero point of each weight: `(N, K, L)`.
        step: `(N, K)`.
        codes: Levels that were chosen, less zero points: `(N, K)`.
        moment: `(K, K)`.

    Returns:
        How far each weight was from the level that was chosen, and from the nearest, in steps.
    """
    left, inverse = w.copy(), np.linalg.inv(moment)
    chosen, nearest = np.empty_like(w), np.empty_like(w)
    for column in np.argsort(-np.diag(moment), kind="stable"):
        level = left[:, column] / step[:, column]
        chosen[:, column] = np.abs(level - codes[:, column])
        nearest[:, column] = np.abs(level[:, None] - levels[:, column]).min(1)
        error = left[:, column] - codes[:, column] * step[:, column]
        left -= np.outer(error, inverse[column]) / inverse[column, column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # eliminated; never met again
    return chosen, nearest


@each
def test_each_code_is_the_one_that_the_published_algorithm_takes(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    codes = gptq(w, scales, spec, moment)
    step, zero = (None if x is None else x.double().numpy() for x in spread(scales, *w.shape))
    zero = np.zeros(w.shape) if zero is None else zero
    levels = spec.grid.levels.double().numpy() - zero[..., None]
    damped = moment.double().numpy()
    damped = damped + 0.01 * np.diag(damped).mean() * np.eye(COLUMNS)
    found = spec.grid.decode(codes).double().numpy() - zero
    chosen, nearest = literal(w.double().numpy(), levels, step, found, damped)
    distance = np.diff(levels, axis=-1).min(-1)  # of neighbours, in steps
    # Those of e5m2 differ by 2**16: beside the largest, float32 does not tell the least apart.
    assert (chosen - nearest <= 2e-3 * distance + 1e-6 * np.abs(found).max(1, keepdims=True)).all()
    assert (codes != quantize(w, scales, spec)).float().mean() > 0.05  # and it did something


def test_a_moment_that_is_not_quite_positive_is_damped() -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    least = torch.linalg.eigvalsh(moment)[-1]
    dented = moment - 0.001 * least * torch.eye(COLUMNS)  # as float32 products of many rows can be
    assert torch.linalg.eigvalsh(dented)[0] < 0
    codes = gptq(w, scales, spec, dented)
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > 3
    hopeless = moment - 100 * least * torch.eye(COLUMNS)
    assert torch.equal(gptq(w, scales, spec, hopeless), quantize(w, scales, spec))


@pytest.mark.parametrize("rows", [10, 60, 150, 2048])
@pytest.mark.parametrize("damping", [1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1.0])
def test_no_damping_is_too_small_to_be_factored(rows: int, damping: float) -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    codes = gptq(w, scales, spec, moment_of(inputs()[:rows]), damping)
    nearest = quantize(w, scales, spec)
    # Ten times smaller than float32 tells apart, nothing is known of the inputs.
    least = -2 if rows == 10 else 3 if damping >= 1e-6 else 0
    assert gain(codes, nearest, w, scales, spec) >= least


def test_every_format_of_weights_is_swept() -> None:
    unsigned = {name for name, grid in formats.items() if grid.low >= 0 and not grid.is_integer}
    assert {spec.format for spec in EVERY} == set(formats.names()) - unsigned
