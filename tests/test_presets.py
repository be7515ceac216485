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
        ("e2m1", "e2m1 channel"),
        ("e2m1-g16", "e2m1 group16"),
        ("ternary", "ternary channel"),
        ("e3m4", "e3m4 channel"),
        ("nf4-g64", "nf4 group64"),
        ("nvfp4", "e2m1 group16 e4m3 scales"),
        ("nvfp4-four-six", "e2m1 group16 e4m3 scales four-six"),
        ("mxfp4-even", "e2m1 group32 e8m0 scales even"),
        ("mxfp6", "e2m3 group32 e8m0 scales"),
        ("mxfp6-e3m2", "e3m2 group32 e8m0 scales"),
        ("mxfp8-e5m2-floor", "e5m2 group32 e8m0 scales floor"),
    ],
)
def test_weights_by_name(name: str, text: str) -> None:
    spec = weight_preset(name)
    assert str(spec) == text
    assert spec.observer == ("absmax" if spec.has_float_blocks else "mse")


def test_inputs_by_name() -> None:
    assert str(input_preset("int8", dynamic=False)) == "int8 tensor asymmetric"
    assert str(input_preset("int6", dynamic=True)) == "int6 token dynamic"
    assert input_preset("e4m3", dynamic=True) == TensorSpec(
        "e4m3", Granularity("token"), dynamic=True
    )
    assert str(input_preset("e4m3", dynamic=False)) == "e4m3 tensor"


@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_in_groups_have_scales_found_at_run_time_by_rules_that_try_nothing(
    dynamic: bool,
) -> None:
    assert str(input_preset("int4-g64", dynamic)) == "int4 group64 dynamic"
    assert str(input_preset("mxfp8", dynamic)) == "e4m3 group32 dynamic e8m0 scales rceil"
    assert str(input_preset("nvfp4", dynamic)) == "e2m1 group16 dynamic e4m3 scales nearest"
    assert input_preset("mxfp4-floor", dynamic).scale_rule == "floor"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("int9", "unknown weight format 'int9'"),
        ("int4-32", "unknown weight format"),
        ("uint4", "weights are signed"),
        ("int8-g32", "8-bit integers take no groups"),
        ("mxfp4-g16", "mxfp4 has blocks of 32"),
        ("e2m1-rceil", "only nvfp4, mxfp4.* have scales that a rule finds"),
        ("mxfp4-four-six", "unknown scale_rule of e8m0 'four-six'"),
    ],
)
def test_other_names_are_errors(name: str, text: str) -> None:
    with pytest.raises(DQError, match=text):
        weight_preset(name)
