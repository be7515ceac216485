import pytest
import torch

from dq.kernels.integer import input_parts, integer_weight
from dq.packing import packed_length
from dq.storage import unpack_weight
from tests.kernels.cases import CONVS, LINEARS, Case

each = pytest.mark.parametrize("case", [*LINEARS, *CONVS], ids=str)
WIDTHS = list({(case.bits, case.group): case for case in LINEARS}.values())


@pytest.mark.parametrize("case", WIDTHS, ids=str)
def test_a_row_scale_times_integers_is_the_weight(case: Case) -> None:
    _, a = case.build()
    whole = integer_weight(a)
    assert whole.dtype == torch.int8
    assert whole.shape == (case.rows, case.columns)
    state = {"weight": a.weight, "weight_scale": a.scale}
    expected = unpack_weight(state, case.spec, case.columns)
    assert torch.allclose(whole * a.scale[:, None], expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_weight_code_and_multiplier_fits_int8(bits: int) -> None:
    # Both ends at once: the lowest code times the highest multiplier is -128, of signs -64.
    _, a = Case((1, 8), 2, bits, 8 if bits <= 6 else 0).build()
    lowest = integer_weight(a._replace(weight=a.weight * 0))
    assert (lowest == -(1 << (bits - 1))).all()
    if a.groups:
        lowest = lowest.int()
        assert int(lowest.min()) << a.multiplier_bits >= -128
        full = a.weight * 0
        full[:, packed_length(a.columns, bits) :] = 255
        top = 1 << a.multiplier_bits
        assert (integer_weight(a._replace(weight=full)) == lowest * top).all()


@each
def test_parts_cover_the_channels_once(case: Case) -> None:
    x, a = case.build()
    x = x if case.geometry else x.flatten(0, -2)
    parts = input_parts(x, a)
    assert len(parts) == max(len(case.segments), 1)
    assert torch.equal(torch.cat([x[:, part.channels] for part in parts], dim=1), x)
    for part in parts:
        assert part.codes.dtype == torch.uint8
        assert part.codes.shape == x[:, part.channels].shape
        assert int(part.codes.max()) < 1 << case.input_bits


@each
def test_codes_stand_for_the_nearest_representable_value(case: Case) -> None:
    x, a = case.build()
    x = x if case.geometry else x.flatten(0, -2)
    top = (1 << case.input_bits) - 1
    for part in input_parts(x, a):
        values = x[:, part.channels]
        low, high = (part.scale * (end - part.zero) for end in (0, top))
        nearest = values.clamp(low, high) if low.dim() == 0 else values.minimum(high)
        restored = part.scale * (part.codes.float() - part.zero)
        assert ((restored - nearest).abs() <= part.scale * 0.5001).all()


@pytest.mark.parametrize("case", [c for c in LINEARS + CONVS if c.inputs == "dynamic"], ids=str)
def test_dynamic_inputs_use_the_whole_range_of_each_row(case: Case) -> None:
    x, a = case.build()
    x = x if case.geometry else x.flatten(0, -2)
    (part,) = input_parts(x, a)
    assert part.zero == 1 << (case.input_bits - 1)
    assert part.scale.shape == (len(x), *[1] * (x.dim() - 1))
    reach = (part.codes.int() - part.zero).abs().flatten(1).amax(1)
    assert (reach == part.zero - 1).all()


def test_rows_of_zeros_have_codes_of_zero() -> None:
    x, a = Case((4, 16), 8, inputs="dynamic").build()
    x[1] = 0
    (part,) = input_parts(x, a)
    assert (part.codes[1] == 128).all()
    assert torch.isfinite(part.scale).all()
