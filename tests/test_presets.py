import pytest

from dq.errors import DQError
from dq.presets import input_preset, weight_preset
from dq.spec import Granularity, TensorSpec


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("int8", "int8 channel"),
        ("int5", "int5 channel"),
        ("int4", "int4 group32 uint4 scales"),
        ("int2", "int2 group32 uint6 scales"),
        ("int4-g64", "int4 group64 uint4 scales"),
        ("int4-g0", "int4 channel"),
        ("e4m3", "e4m3 channel"),
        ("e2m1", "e2m1 group32"),
        ("e2m1-g16", "e2m1 group16"),
        ("ternary", "ternary group32"),
    ],
)
def test_weights_by_name(name: str, text: str) -> None:
    spec = weight_preset(name)
    assert str(spec) == text
    assert spec.observer == "mse"


def test_inputs_by_name() -> None:
    assert str(input_preset("int8", dynamic=False)) == "int8 tensor asymmetric"
    assert str(input_preset("int6", dynamic=True)) == "int6 token dynamic"
    assert input_preset("e4m3", dynamic=True) == TensorSpec(
        "e4m3", Granularity("token"), dynamic=True, observer="mse"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("int9", "unknown weight format 'int9'"),
        ("int4-32", "unknown weight format"),
        ("uint4", "weights are signed"),
        ("int8-g32", "8-bit integers take no groups"),
    ],
)
def test_other_names_are_errors(name: str, text: str) -> None:
    with pytest.raises(DQError, match=text):
        weight_preset(name)
