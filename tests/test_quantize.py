import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq.distance import relative_error
from dq.errors import DQError
from dq.formats import IntFormat, formats
from dq.observers import observers
from dq.quantize import choose_scales, dequantize, fake_quantize, quantize
from dq.scales import Scales
from dq.spec import Granularity, TensorSpec
from tests.specs import GROUP, INPUTS, WEIGHTS

ALL = tuple(dict.fromkeys([*WEIGHTS, *INPUTS]))
TWO_LEVEL = [spec for spec in WEIGHTS if isinstance(spec.scale_grid, IntFormat)]
each = pytest.mark.parametrize("spec", ALL, ids=str)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda n: n * GROUP))


def matrix(shape: tuple[int, int], seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * spread


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_is_dequantize_of_quantize(spec: TensorSpec, dtype: torch.dtype) -> None:
    x = matrix((6, 40), 0).to(dtype)
    scales = choose_scales(x, spec)
    codes = quantize(x, scales, spec)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert int(codes.max()) < 1 << spec.code_bits
    expected = dequantize(codes, scales, spec)
    assert expected.dtype == torch.float32
    assert torch.equal(fake_quantize(x, scales, spec), expected)


@pytest.mark.parametrize("zero", [-128.0, -3.0, 0.0, 2.0, 127.0])
def test_where_ties_go_does_not_depend_on_the_zero_point(zero: float) -> None:
    # Kernels round first and add the zero point then.
    spec = TensorSpec("int8", Granularity("tensor"), symmetric=False)
    scales = Scales(torch.tensor([[2.0]]), torch.tensor([[zero]]))
    x = torch.arange(-9.0, 10.0)[None]
    expected = (torch.round(x / 2) + zero).clamp(-128, 127) - zero
    assert torch.equal(fake_quantize(x, scales, spec), expected * 2)
    assert torch.equal(dequantize(quantize(x, scales, spec), scales, spec), expected * 2)


@each
def test_strips_of_rows_change_nothing(spec: TensorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix((50, 40), 3)
    scales = choose_scales(x, spec)
    codes = quantize(x, scales, spec)
    monkeypatch.setattr("dq.quantize._STRIP", 7 * 40)
    for found, whole in zip(choose_scales(x, spec), scales, strict=True):
        assert (found is None) == (whole is None)
        assert found is None or torch.equal(found, whole)
    assert torch.equal(quantize(x, scales, spec), codes)


@each
def test_quantizing_again_changes_nothing(spec: TensorSpec) -> None:
    x = matrix((6, 40), 1)
    scales = choose_scales(x, spec)
    once = fake_quantize(x, scales, spec)
    assert torch.allclose(fake_quantize(once, scales, spec), once, rtol=1e-6, atol=0)


@each
def test_scales_have_the_documented_shapes(spec: TensorSpec) -> None:
    x = matrix((6, 40), 2)
    blocks = spec.granularity.blocks(6, 40)
    scale, zero, multiplier, more = scales = choose_scales(x, spec)
    two_level = spec.scale_grid is not None
    outer = (6 if spec.outer_by_row else 1, 1)
    assert scale.shape == (outer if two_level else blocks)
    assert (scale > 0).all()
    assert (zero is None) == spec.symmetric
    assert zero is None or zero.shape == blocks
    assert (multiplier is not None) == two_level
    assert multiplier is None or multiplier.shape == blocks
    assert (more is not None) == (spec.bases > 1)
    assert more is None or more.shape == (*blocks, spec.bases - 1)
    on_meta = choose_scales(x.to("meta"), spec)
    for value, meta in zip(scales, on_meta, strict=True):
        assert (value is None) == (meta is None)
        assert value is None or (meta.is_meta and meta.shape == value.shape)


@given(
    st.sampled_from(
        [s for s in ALL if isinstance(s.grid, IntFormat) and s.scale_format == "float32"]
    ),
    sizes,
    st.integers(0, 999),
    st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_errors_inside_the_range_are_at_most_half_a_step(
    spec: TensorSpec, shape: tuple[int, int], seed: int, spread: float
) -> None:
    x = matrix(shape, seed, spread)
    if spec.symmetric and spec.grid.low == 0:
        x = x.abs()
    scales = choose_scales(x, spec)
    y = fake_quantize(x, scales, spec)
    step = scales.step.repeat_interleave(shape[1] // scales.step.shape[1], 1)
    step = step.expand(shape[0], shape[1])
    zero = 0 if scales.zero is None else scales.zero.repeat_interleave(
        shape[1] // scales.zero.shape[1], 1
    )  # fmt: skip
    levels = x / step + zero
    fits = (levels >= spec.grid.low) & (levels <= spec.grid.high)
    assert ((y - x).abs() <= step * 0.5001)[fits].all()
    if spec.observer == "absmax":
        # Only the rounding of the zero point pushes values off the grid, and by half a step.
        assert ((y - x).abs() <= step * 1.001).all()


@given(st.sampled_from(ALL), st.integers(0, 999))
def test_order_is_kept_where_a_scale_is_shared(spec: TensorSpec, seed: int) -> None:
    x = matrix((4, GROUP), seed).sort(dim=1).values
    y = fake_quantize(x, choose_scales(x, spec), spec)
    assert (y.diff(dim=1) >= 0).all()


@given(st.sampled_from(TWO_LEVEL), sizes, st.integers(0, 999))
def test_two_level_products_are_int8_and_exact(
    spec: TensorSpec, shape: tuple[int, int], seed: int
) -> None:
    x = matrix(shape, seed) * torch.exp(matrix((shape[0], shape[1]), seed + 1))
    scales = choose_scales(x, spec)
    codes = quantize(x, scales, spec)
    multiplier = scales.multiplier.repeat_interleave(GROUP, 1)
    assert torch.equal(multiplier, multiplier.round())
    assert multiplier.min() >= 1
    assert multiplier.max() <= formats[spec.scale_format].high + 1
    whole = spec.grid.decode(codes) * multiplier
    assert whole.min() >= -128
    assert whole.max() <= 127
    restored = dequantize(codes, scales, spec)
    assert torch.allclose(restored, whole * scales.scale, rtol=3e-7, atol=0)


@given(st.sampled_from(TWO_LEVEL), st.integers(0, 999))
@settings(max_examples=30)
def test_two_levels_cost_little_beside_a_float_scale_a_group(spec: TensorSpec, seed: int) -> None:
    x = matrix((8, 8 * GROUP), seed)
    plain = TensorSpec(spec.format, spec.granularity)
    errors = [relative_error(fake_quantize(x, choose_scales(x, s), s), x) for s in (spec, plain)]
    # One or two bits of multiplier leave steps of a factor of up to two.
    assert errors[0] <= errors[1] * (1.1 if spec.grid.bits <= 4 else 2.1)


@pytest.mark.parametrize("spec", [s for s in WEIGHTS if s.grid.bits > 1], ids=str)
def test_zero_groups_do_not_spoil_their_neighbours(spec: TensorSpec) -> None:
    spread = 1e-3  # weights are small beside 1, the scale of zeros
    x = matrix((4, 4 * GROUP), 3, spread)
    if spec.symmetric and spec.grid.low == 0:
        x = x.abs()
    x[:, :GROUP] = 0
    y = fake_quantize(x, choose_scales(x, spec), spec)
    assert (y[:, :GROUP].abs() <= 1e-6 * spread).all()
    full = fake_quantize(x[:, GROUP:], choose_scales(x[:, GROUP:], spec), spec)
    error = relative_error(y[:, GROUP:], x[:, GROUP:])
    assert error <= 1.05 * relative_error(full, x[:, GROUP:]) + 1e-3


@each
def test_all_zero_matrices_stay_zero(spec: TensorSpec) -> None:
    x = torch.zeros(3, 2 * GROUP)
    y = fake_quantize(x, choose_scales(x, spec), spec)
    assert torch.isfinite(y).all()
    if 0 in spec.grid.round(torch.zeros(1)):
        assert torch.equal(y, x)


@each
def test_a_unit_changes_scales_only(spec: TensorSpec) -> None:
    x = matrix((4, 40), 4)
    small, large = choose_scales(x, spec), choose_scales(x * 1024, spec)
    assert torch.equal(large.step, small.step * 1024)
    assert torch.equal(quantize(x, small, spec), quantize(x * 1024, large, spec))


@pytest.mark.parametrize("name", observers.names())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [40, 40_000])
def test_values_that_are_not_finite_are_refused(name: str, bad: float, columns: int) -> None:
    x = matrix((2, columns), 0)
    x[1, 7] = bad
    spec = TensorSpec("int8", Granularity("channel"), observer=name)
    with pytest.raises(DQError, match="holds values that are not finite"):
        choose_scales(x, spec)


@each
def test_gradients_are_one_inside_and_zero_outside(spec: TensorSpec) -> None:
    scales = choose_scales(matrix((4, 40), 5), spec)
    x = (matrix((4, 40), 6) * 4).requires_grad_()
    fake_quantize(x, scales, spec).sum().backward()
    if spec.is_binary:
        assert torch.equal(x.grad, torch.ones_like(x))  # signs have no end
        return
    step = scales.step.repeat_interleave(40 // scales.step.shape[1], 1)
    levels = x.detach() / step
    if scales.zero is not None:
        levels = levels + scales.zero.repeat_interleave(40 // scales.zero.shape[1], 1)
    inside = (levels >= spec.grid.low) & (levels <= spec.grid.high)
    assert inside.any()
    assert not inside.all()
    assert torch.allclose(x.grad, inside.float(), atol=1e-6)


@each
def test_the_largest_value_of_a_row_has_its_gradient(spec: TensorSpec) -> None:
    if spec.observer != "absmax" or spec.scale_grid is not None or not spec.symmetric:
        return  # its scale is not that of the largest value
    x = matrix((64, 40), 8).abs().requires_grad_()
    fake_quantize(x, choose_scales(x.detach(), spec), spec).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("format", [n for n, f in formats.items() if isinstance(f, IntFormat)])
def test_gradients_of_the_scale_are_those_of_lsq(format: str) -> None:
    # Esser et al. 2020, equation 3: the rounding error inside, the level at the ends outside.
    spec = TensorSpec(format, Granularity("tensor"))
    x = matrix((3, 40), 7)
    scales = choose_scales(x, spec)
    scale = (scales.scale * 0.5).requires_grad_()
    fake_quantize(x, scales._replace(scale=scale), spec).sum().backward()
    levels = x / scale.detach()
    inside = levels.clamp(spec.grid.low, spec.grid.high)
    expected = spec.grid.round(inside) - torch.where(levels == inside, levels, 0.0)
    assert scale.grad.item() == pytest.approx(expected.sum().item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("spec", TWO_LEVEL, ids=str)
def test_zeros_and_multipliers_stay_out_of_the_way_of_gradients(spec: TensorSpec) -> None:
    scales = choose_scales(matrix((4, 40), 8), spec)
    scale = scales.scale.clone().requires_grad_()
    fake_quantize(matrix((4, 40), 9), scales._replace(scale=scale), spec).square().sum().backward()
    assert torch.isfinite(scale.grad).all()
    assert (scale.grad != 0).all()
