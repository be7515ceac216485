import pytest
import torch

from dq.errors import DQError
from dq.observers import observers
from dq.scales import scales_of_range
from dq.spec import Granularity, TensorSpec

SPEC = TensorSpec("int4", Granularity("tensor"), symmetric=False)
each = pytest.mark.parametrize("name", observers.names())


def ranges(name: str, *tensors: torch.Tensor, spec: TensorSpec = SPEC):
    observer = observers[name](spec)
    for x in tensors:
        observer.update(x)
    return observer.range()


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: TensorSpec) -> float:
    scale, zero, *_ = scales_of_range(low, high, spec)
    zero = 0 if zero is None else zero[:, None]
    levels = x / scale[:, None] + zero
    return float((((spec.grid.round(levels) - zero) * scale[:, None]) - x).square().mean())


@each
def test_ranges_have_one_value_a_row_within_the_data(name: str) -> None:
    x = torch.randn(3, 500)
    low, high = ranges(name, x)
    assert low.shape == high.shape == (3,)
    assert (low >= x.amin(1)).all()
    assert (high <= x.amax(1)).all()
    assert (low < high).all()


@each
def test_rows_do_not_influence_each_other(name: str) -> None:
    x = torch.randn(3, 500) * torch.tensor([[1.0], [10.0], [0.1]])
    low, high = ranges(name, x)
    for row in range(3):
        alone = ranges(name, x[row : row + 1])
        assert (low[row], high[row]) == (alone[0][0], alone[1][0])


@each
def test_every_update_counts(name: str) -> None:
    small, large = torch.rand(2, 64), torch.rand(2, 64) * 100 - 50
    low, high = ranges(name, small, large, small)
    first = ranges(name, small)
    assert (high > 10 * first[1]).all()
    assert (low < -10).all()


@each
def test_data_is_neither_kept_nor_changed(name: str) -> None:
    x = torch.randn(1, 300)
    before = x.clone()
    observer = observers[name](SPEC)
    observer.update(x)
    assert torch.equal(x, before)
    expected = observer.range()
    x.mul_(1000)
    assert all(torch.equal(a, b) for a, b in zip(observer.range(), expected, strict=True))


@each
def test_equal_data_gives_equal_ranges(name: str) -> None:
    x = torch.randn(1, 50_000)
    assert ranges(name, x) == ranges(name, x.clone())


@each
def test_nothing_observed_is_an_error(name: str) -> None:
    with pytest.raises(DQError, match="no data was observed; run calibration on inputs"):
        ranges(name)


@each
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_data_is_represented(name: str, value: float) -> None:
    x = torch.full((2, 100), value)
    low, high = ranges(name, x)
    assert error(x, low, high, SPEC) <= 1e-10 * (1 + value * value)


def test_absmax_is_exact_over_all_updates() -> None:
    a, b = torch.randn(2, 40), torch.randn(2, 50)
    low, high = ranges("absmax", a, b)
    both = torch.cat([a, b], dim=1)
    assert torch.equal(low, both.amin(1))
    assert torch.equal(high, both.amax(1))


def test_percentile_leaves_out_the_ends() -> None:
    x = torch.rand(2, 20_000)
    x[:, 0], x[:, 1] = 1e6, -1e6
    low, high = ranges("percentile", x)
    assert (low >= 0).all()
    assert (low < 0.01).all()
    assert (high > 0.99).all()
    assert (high <= 1).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int2", "int4", "int8", "e2m1"])
def test_mse_is_never_worse_than_the_full_range(format: str, symmetric: bool) -> None:
    if format == "e2m1" and not symmetric:
        pytest.skip("float formats have no zero point")
    spec = TensorSpec(format, Granularity("channel"), symmetric=symmetric)
    x = torch.distributions.StudentT(3).sample((4, 800))
    searched = error(x, *ranges("mse", x, spec=spec), spec)
    full = error(x, *ranges("absmax", x), spec)
    assert searched <= full
    if spec.grid.bits <= 4:
        assert searched < 0.8 * full, "heavy tails must be cut"


def test_samples_are_bounded_and_reach_the_end() -> None:
    observer = observers["mse"](SPEC)
    x = torch.zeros(1, 1 << 18)
    x[0, -8192:] = 1.0
    observer.update(x)
    kept = observer.sample()
    assert kept.shape[1] <= 1.1 * observer.per_update
    assert kept.sum() > 100
