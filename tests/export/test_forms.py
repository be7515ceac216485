"""Bytes of each form, written out by hand."""

import pytest
import torch
from torch import nn

from dq.export.forms import e2m1_pairs, form, fp8, int8, mx, nvfp4
from dq.nn import PackedLayer
from dq.nn.packed import packed
from dq.plan import LayerSpec
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec

# Codes 0 to 15 of e2m1 in order; code 8 is -0.
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
IN_ORDER = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


def pack(weight: torch.Tensor, spec: TensorSpec) -> PackedLayer:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    made = packed(layer, LayerSpec(spec))
    made.load_layer(layer)
    return made


def test_nvfp4_by_hand() -> None:
    # The largest magnitude is 448 * 6: the outer scale is 1, that of a block its largest over 6.
    first = torch.tensor(E2M1)
    top = torch.tensor([6.0] + 15 * [0.0])
    rows = [torch.cat([448 * first, top]), torch.cat([-2 * top + first.flip(0) * 0, 0.5 * first])]
    layer = pack(torch.stack(rows), weight_preset("nvfp4-nearest"))
    blocks = nvfp4(layer)
    assert blocks.outer.shape == ()
    assert blocks.outer == 1
    # e4m3: 448 = 0x7E, 1 = 0x38, 2 = 0x40, 0.5 = 0x30.
    assert blocks.scales.dtype == torch.float8_e4m3fn
    assert blocks.scales.view(torch.uint8).tolist() == [[0x7E, 0x38], [0x40, 0x30]]
    assert blocks.elements.dtype == torch.uint8
    assert blocks.elements[0].tolist() == [*IN_ORDER, 0x07, *7 * [0]]
    assert blocks.elements[1, 0] & 15 == 0xF  # -6 comes first: in the low half
    assert blocks.elements[1, 8:].tolist() == IN_ORDER


def test_mxfp4_by_hand() -> None:
    first = torch.tensor(E2M1)
    rows = [torch.cat([4 * first, 0 * first]), torch.cat([first / 8, first / 8])]
    blocks = mx(pack(torch.stack(rows), weight_preset("mxfp4-rceil")))
    assert blocks.scales.tolist() == [[127 + 2], [127 - 3]]
    assert blocks.scales.dtype == torch.uint8
    assert blocks.elements[0, :8].tolist() == IN_ORDER
    assert blocks.elements[1].tolist() == 2 * IN_ORDER
    assert blocks.outer == 1


@pytest.mark.parametrize(
    ("name", "largest", "bits"),
    [("mxfp6", 7.5, 0b011111), ("mxfp6-e3m2", 28.0, 0b011111), ("mxfp8", 448.0, 0x7E),
     ("mxfp8-e5m2", 57344.0, 0x7B)],
)  # fmt: skip
def test_mx_keeps_an_element_a_byte(name: str, largest: float, bits: int) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 1], weight[0, 2] = largest, -largest
    blocks = mx(pack(weight, weight_preset(f"{name}-rceil")))
    assert blocks.scales.tolist() == [[127]]
    sign = 1 << (5 if name.startswith("mxfp6") else 7)
    assert blocks.elements[0, :4].tolist() == [0, bits, bits | sign, 0]


def test_fp8_by_hand() -> None:
    weight, scale = fp8(pack(torch.tensor([[448.0, -1.0], [0.5, 896.0]]), weight_preset("e4m3")))
    assert weight.dtype == torch.float8_e4m3fn
    assert scale.tolist() == [1.0, 2.0]
    assert weight.view(torch.uint8).tolist() == [[0x7E, 0xB8], [0x28, 0x7E]]


def test_floats_of_fewer_bits_are_fp8_too() -> None:
    weight, scale = fp8(
        pack(torch.tensor([[6.0, -1.5]]), TensorSpec("e2m1", Granularity("channel")))
    )
    assert scale.tolist() == [1.0]
    assert weight.float().tolist() == [[6.0, -1.5]]


def test_int8_by_hand() -> None:
    spec = TensorSpec("int8", Granularity("channel"))
    weight, scale = int8(pack(torch.tensor([[127.0, -3.0, 0.0], [254.0, 4.0, -254.0]]), spec))
    assert weight.dtype == torch.int8
    assert scale.tolist() == [1.0, 2.0]
    assert weight.tolist() == [[127, -3, 0], [127, 2, -127]]


def test_groups_with_whole_multipliers_are_int8() -> None:
    layer = pack(torch.randn(8, 64), weight_preset("int4"))
    weight, scale = int8(layer)
    # Scale times multiplier, then times level, or the other way about: one rounding apart.
    torch.testing.assert_close(weight * scale[:, None], layer.float_weight(), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *((weight_preset(name), name) for name in ("nvfp4", "mxfp4", "mxfp6", "mxfp8")),
        (weight_preset("mxfp6-e3m2"), "mxfp6-e3m2"),
        (weight_preset("e4m3"), "fp8"),
        (weight_preset("e2m1"), "fp8"),
        (weight_preset("e5m2"), None),
        (weight_preset("e3m4"), None),
        (weight_preset("e4m3-g32"), None),
        (weight_preset("nf4"), None),
        (weight_preset("int8"), "int8"),
        (weight_preset("int4"), "int8"),
        (weight_preset("binary"), "int8"),
        (weight_preset("ternary-g32"), "int8"),
        (weight_preset("binary-x2"), None),
        (TensorSpec("int4", Granularity("group", 32)), "groups"),
        (TensorSpec("int8", Granularity("channel"), symmetric=False), None),
    ],
    ids=str,
)
def test_form(spec: TensorSpec, expected: str | None) -> None:
    assert form(spec) == expected


def test_pairs_keep_the_order() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    assert e2m1_pairs(codes).tolist() == [[0x10, 0x32, 0x54, 0x76]]
