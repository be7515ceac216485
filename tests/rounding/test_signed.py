import itertools

import pytest
import torch
from torch import Tensor

from dq.quantize import dequantize, quantize
from dq.rounding.error import output_error
from dq.rounding.grid import spread
from dq.rounding.signed import signed_rounding
from dq.scales import Scales
from dq.spec import Granularity, TensorSpec
from tests.rounding.cases import (
    NARROW,
    each,
    inputs,
    moment_of,
    scaled,
)

FEW = {name: NARROW[name] for name in ("int4-g32", "e2m1", "nvfp4", "mxfp4", "uint4")}

few = pytest.mark.parametrize("spec", FEW.values(), ids=[*FEW])


@each
@pytest.mark.parametrize(("rate", "most"), [(0.0, 0.7), (0.3, 1.0)])
def test_no_row_is_worse_than_the_nearest_levels(
    spec: TensorSpec, rate: float, most: float
) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    codes = signed_rounding(w, scales, spec, moment, steps=50, rate=rate)
    error, before = (
        output_error(c, w, scales, spec, moment) for c in (codes, quantize(w, scales, spec))
    )
    assert (error <= before * (1 + 1e-5)).all()
    assert error.sum() < most * before.sum()


@each
def test_weights_become_a_level_next_to_them(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = signed_rounding(w, scales, spec, moment_of(inputs()), steps=20)
    assert codes.dtype == torch.uint8
    assert codes.shape == w.shape
    step, zero = spread(scales, *w.shape)
    place = w / step + (0.0 if zero is None else zero)
    levels = spec.grid.levels
    found = spec.grid.decode(codes)
    assert torch.isin(found, levels).all()
    # No other level lies between a weight and its own, which is the last one beyond the grid.
    low, high = torch.minimum(place, found), torch.maximum(place, found)
    between = (levels > low[..., None] + 1e-5) & (levels < high[..., None] - 1e-5)
    assert not between.any()
    assert 0 < (codes != quantize(w, scales, spec)).float().mean() < 0.5


@each
def test_without_steps_the_levels_are_the_nearest(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = signed_rounding(w, scales, spec, moment_of(inputs()), steps=0)
    assert torch.equal(codes, quantize(w, scales, spec))


CHANNEL = TensorSpec("int4", Granularity("channel"))
UNIT = Scales(torch.ones(1, 1))  # levels are the integers from -7 to 7


def test_the_error_of_one_weight_makes_up_for_that_of_its_neighbour() -> None:
    """The nearest levels are both 0, with a loss of 0.694; (1, 0) has 0.066, (0, 1) has 0.058."""
    w = torch.tensor([[0.4, 0.45]])
    moment = torch.tensor([[1.0, 0.92], [0.92, 1.0]])
    codes = signed_rounding(w, UNIT, CHANNEL, moment)
    assert dequantize(codes, UNIT, CHANNEL).tolist() == [[0.0, 1.0]]


def test_few_weights_come_to_the_best_of_all_roundings_or_near_it() -> None:
    """Of each row all 2^8 roundings are tried."""
    columns = 8
    generator = torch.Generator().manual_seed(3)
    w = torch.rand(64, columns, generator=generator) * 8 - 4
    mixture = torch.eye(columns) + 0.5 * torch.rand(columns, columns, generator=generator)
    moment = mixture @ mixture.T
    scales = Scales(torch.ones(len(w), 1))

    def loss(levels: Tensor) -> Tensor:
        error = levels - w
        return ((error @ moment) * error).sum(1)

    ways = itertools.product((0.0, 1.0), repeat=columns)
    least = torch.stack([loss(w.floor() + torch.tensor(way)) for way in ways]).amin(0)
    nearest = loss(w.round())
    found = loss(dequantize(signed_rounding(w, scales, CHANNEL, moment), scales, CHANNEL))
    assert (found >= least * (1 - 1e-5)).all()
    assert (found <= nearest * (1 + 1e-5)).all()
    assert (found <= least * (1 + 1e-5)).float().mean() > 0.5
    assert (found - least).sum() < 0.2 * (nearest - least).sum()
