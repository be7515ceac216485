import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq.errors import DQError
from dq.spec import Granularity, TensorSpec
from dq.storage import stored_shapes
from tests.specs import INPUTS, WEIGHTS

CHANNEL, GROUP32 = Granularity("channel"), Granularity("group", 32)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("tensor", (1, 1)), ("channel", (6, 1)), ("token", (6, 1)), ("group32", (6, 3))],
)
def test_granularities_are_written_as_they_are_read(text: str, blocks: tuple[int, int]) -> None:
    granularity = Granularity.parse(text)
    assert str(granularity) == text
    assert granularity.blocks(6, 96) == blocks


@pytest.mark.parametrize("text", ["group", "group0", "group-4", "groups32", "row", ""])
def test_other_granularities_are_refused(text: str) -> None:
    with pytest.raises(DQError, match="unknown granularity"):
        Granularity.parse(text)


def test_a_group_that_does_not_divide_names_the_divisors_near_it() -> None:
    text = "group size 96 does not divide 640 input features; divisors near it: 80, 128, 64"
    with pytest.raises(DQError) as caught:
        Granularity("group", 96).blocks(4, 640)
    named = str(caught.value).split("near it: ")[1].split(", ")
    assert str(caught.value).startswith(text.split(" near it")[0])
    assert named == ["64", "80", "128"]


def test_columns_without_a_divisor_say_so() -> None:
    with pytest.raises(DQError, match="divisors near it: none"):
        Granularity("group", 32).blocks(4, 7)


@given(st.integers(1, 200), st.integers(1, 2000))
def test_every_divisor_that_is_named_divides(size: int, columns: int) -> None:
    granularity = Granularity("group", size)
    if columns % size == 0:
        assert granularity.blocks(3, columns) == (3, columns // size)
        return
    with pytest.raises(DQError) as caught:
        granularity.blocks(3, columns)
    for word in str(caught.value).split("near it: ")[1].split(", "):
        assert word == "none" or columns % int(word) == 0


@pytest.mark.parametrize("spec", dict.fromkeys([*WEIGHTS, *INPUTS]), ids=str)
def test_specs_survive_json(spec: TensorSpec) -> None:
    again = TensorSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_defaults_are_left_out_of_json() -> None:
    assert TensorSpec("int8", CHANNEL).to_dict() == {"format": "int8", "granularity": "channel"}


@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_bytes_are_those_of_the_stored_tensors(spec: TensorSpec) -> None:
    for shape in [(5, 24), (1, 8), (7, 72)]:
        stored = stored_shapes(spec, *shape).values()
        assert spec.bytes(*shape) == sum(math.prod(size) * d.itemsize for size, d in stored)


def test_bytes_of_the_usual_formats() -> None:
    assert TensorSpec("int8", CHANNEL).bytes(10, 64) == 10 * (64 + 4)
    assert TensorSpec("int4", GROUP32).bytes(10, 64) == 10 * (32 + 2 * 4)
    assert TensorSpec("int4", GROUP32, scale_format="uint4").bytes(10, 64) == 10 * (32 + 4 + 1)
    assert TensorSpec("uint4", GROUP32, symmetric=False).bytes(10, 64) == 10 * (32 + 8 + 1)


@pytest.mark.parametrize(
    ("spec", "deployable"),
    [
        (TensorSpec("int4", GROUP32), True),
        (TensorSpec("e4m3", CHANNEL), True),
        (TensorSpec("e5m2", CHANNEL), True),
        (TensorSpec("e2m1", CHANNEL), True),  # its levels are e4m3 levels
        (TensorSpec("e3m4", CHANNEL), False),
        (TensorSpec("e1m2", CHANNEL), True),  # likewise
        (TensorSpec("ue4m4", CHANNEL), False),
        (TensorSpec("nf4", GROUP32), False),
        (TensorSpec("e2m1", GROUP32, scale_format="e8m0"), True),
        (TensorSpec("e2m1", GROUP32, scale_format="e4m3"), False),
        (TensorSpec("e2m1", Granularity("group", 16), scale_format="e4m3"), True),
        (TensorSpec("e4m3", GROUP32), False),
    ],
    ids=str,
)
def test_what_hardware_multiplies_is_told_from_what_is_emulated(
    spec: TensorSpec, deployable: bool
) -> None:
    assert spec.is_deployable == deployable


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"format": "int9"}, "unknown format 'int9'. Did you mean 'int"),
        ({"format": "e4m3", "symmetric": False}, "asymmetric e4m3: only integers"),
        ({"scale_format": "int4"}, "'int4' is not float32, an unsigned integer format, e8m0"),
        ({"scale_format": "e2m1"}, "'e2m1' is not float32, an unsigned integer format, e8m0"),
        ({"scale_format": "e4m3"}, "e4m3 scales need a symmetric format with groups"),
        ({"granularity": GROUP32, "scale_format": "e8m0", "symmetric": False}, "e8m0 scales need"),
        ({"granularity": GROUP32, "scale_format": "e8m0", "observer": "mse"}, "observer absmax"),
        (
            {"granularity": GROUP32, "scale_format": "e4m3", "scale_rule": "four-six"},
            "unknown scale_rule of e4m3 'four-six'",
        ),
        ({"scale_rule": "floor"}, "unknown scale_rule of float32 'floor'"),
        ({"format": "e8m0"}, "e8m0 has no zero: it is for scales, not for values"),
        ({"scale_format": "float16"}, "unknown format 'float16'"),
        ({"scale_format": "uint4"}, "integer scales need a symmetric integer format with groups"),
        (
            {"format": "e2m1", "granularity": GROUP32, "scale_format": "uint4"},
            "integer scales need a symmetric integer format with groups",
        ),
        (
            {"granularity": GROUP32, "scale_format": "uint4", "symmetric": False},
            "integer scales need a symmetric integer format with groups",
        ),
        (
            {"granularity": GROUP32, "scale_format": "uint5"},
            "leave the int8 range; at most 4 bits of multiplier fit 4-bit codes",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict, text: str) -> None:
    with pytest.raises(DQError, match=text):
        TensorSpec(**{"format": "int4", "granularity": CHANNEL, **arguments})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"format": "int8"}, "needs the key 'granularity'"),
        ({"granularity": "channel"}, "needs the key 'format'"),
        (
            {"format": "int8", "granularity": "channel", "symetric": True},
            "unknown key of a tensor spec 'symetric'. Did you mean 'symmetric'?",
        ),
    ],
)
def test_json_is_read_strictly(values: dict, text: str) -> None:
    with pytest.raises(DQError, match=text):
        TensorSpec.from_dict(values)


def test_the_written_form_tells_specs_apart() -> None:
    specs = [spec for spec in dict.fromkeys([*WEIGHTS, *INPUTS]) if spec.observer == "absmax"]
    assert len({str(spec) for spec in specs}) == len(specs)
