import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.formats import IntFormat
from dq.quantize import dequantize, quantize
from dq.rounding.error import better, output_error
from dq.spec import TensorSpec
from tests.rounding.cases import NARROW, ROWS, each, inputs, moment_of, scaled


def random_codes(spec: TensorSpec, shape: torch.Size, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    levels = spec.grid.levels
    return spec.grid.encode(levels[torch.randint(len(levels), shape, generator=generator)])


@each
def test_it_is_the_squared_error_that_is_measured(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    x = inputs(rows=500).double()
    for codes in (quantize(w, scales, spec), random_codes(spec, w.shape, 0)):
        wrong = dequantize(codes, scales, spec).double()
        measured = (x @ wrong.T - x @ w.double().T).square().mean(0)
        error = output_error(codes, w, scales, spec, moment_of(x).float())
        assert error.shape == (ROWS,)
        torch.testing.assert_close(error.double(), measured, rtol=1e-4, atol=0)


def test_weights_on_their_levels_have_none() -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    codes = quantize(w, scales, spec)
    exact = dequantize(codes, scales, spec)
    assert not output_error(codes, exact, scales, spec, moment_of(inputs())).any()


@given(st.sampled_from([*NARROW.values()]), st.integers(1, 4), st.integers(0, 99))
def test_each_channel_takes_its_best(spec: TensorSpec, count: int, seed: int) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    nearest = quantize(w, scales, spec)
    candidates = []
    for index in range(count):
        some = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed + index)) < 0.1
        noise = random_codes(spec, w.shape, seed + index)
        candidates.append(torch.where(some, noise, nearest))
    chosen = better(tuple(candidates), w, scales, spec, moment)
    error = output_error(chosen, w, scales, spec, moment)
    others = torch.stack([output_error(c, w, scales, spec, moment) for c in candidates])
    assert torch.equal(error, others.min(0).values)
    for row in range(ROWS):
        assert any(torch.equal(chosen[row], c[row]) for c in candidates)


def test_of_equals_the_first_is_taken() -> None:
    spec = NARROW["int4-g32"]
    assert isinstance(spec.grid, IntFormat)
    w, scales = scaled(spec)
    first, second = random_codes(spec, w.shape, 1), random_codes(spec, w.shape, 2)
    blind = torch.zeros(w.shape[1], w.shape[1])  # every error is zero
    assert torch.equal(better((first, second), w, scales, spec, blind), first)
    assert torch.equal(better((second, first), w, scales, spec, blind), second)
