import pytest
import torch

from dq.quantize import dequantize, quantize
from dq.rounding.grid import spread
from dq.rounding.learned import learned_rounding
from dq.spec import TensorSpec
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
def test_weights_become_a_level_next_to_them(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = learned_rounding(w, scales, spec, moment_of(inputs()), steps=20, rate=0.3)
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
    nearest = quantize(w, scales, spec)
    assert 0 < (codes != nearest).float().mean() < 0.5


@each
def test_it_starts_from_the_nearest_levels(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = learned_rounding(w, scales, spec, moment_of(inputs()), steps=0)
    step, _ = spread(scales, *w.shape)
    found, wanted = (dequantize(c, scales, spec) for c in (codes, quantize(w, scales, spec)))
    # Equal but for ties, and for 0 and -0.
    assert ((found - w).abs() - (wanted - w).abs() <= 1e-5 * step).all()
    assert (found != wanted).float().mean() < 1e-3
