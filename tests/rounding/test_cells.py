"""Weights that stand for codes by rounding to nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dq.quantize import quantize
from dq.rounding.cells import within_cells
from dq.rounding.gptq import gptq
from dq.scales import Scales
from dq.spec import TensorSpec
from tests.rounding.cases import NARROW, each, inputs, moment_of, narrow, scaled


def check(w: Tensor, codes: Tensor, scales: Scales, spec: TensorSpec) -> None:
    found = quantize(w, scales, spec)
    assert torch.equal(spec.grid.decode(found), spec.grid.decode(codes))  # -0 is 0


@narrow
def test_gptq_codes_are_the_nearest(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = gptq(w, scales, spec, moment_of(inputs()))
    assert (codes != quantize(w, scales, spec)).any()
    check(within_cells(w, codes, scales, spec), codes, scales, spec)


@each
@given(seed=st.integers(0, 2**31))
def test_so_are_any_codes(spec: TensorSpec, seed: int) -> None:
    w, scales = scaled(spec)
    generator = torch.Generator().manual_seed(seed)
    levels = spec.grid.levels
    picked = levels[torch.randint(len(levels), w.shape, generator=generator)]
    codes = spec.grid.encode(picked)
    check(within_cells(w, codes, scales, spec), codes, scales, spec)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g0", "int3"])
def test_on_integers_it_is_the_offset_of_adaround(name: str) -> None:
    """Equation 21 of AdaRound, folded into the weight: w + step * (1[up] - 1/2)."""
    spec = NARROW[name]
    w, scales = scaled(spec)
    step = scales.step.repeat_interleave(w.shape[1] // scales.step.shape[1], 1)
    below = torch.floor(w / step)
    inside = (below >= spec.grid.low) & (below + 1 <= spec.grid.high)
    share = w / step - below
    inside &= (share > 0.05) & (share < 0.95)
    assert inside.float().mean() > 0.8
    up = torch.randint(2, w.shape)
    codes = spec.grid.encode((below + up).clamp(spec.grid.low, spec.grid.high))
    found = within_cells(w, codes, scales, spec)
    expected = w + step * (up - 0.5)
    assert torch.allclose(found[inside], expected[inside], atol=1e-5 * float(step.max()))
