import json

import pytest

from dq.errors import DQError
from dq.plan import PLAN_VERSION, LayerSpec, Plan, match
from dq.spec import Granularity, TensorSpec
from tests.specs import layer_specs

CHANNEL, TENSOR, TOKEN = (Granularity(kind) for kind in ("channel", "tensor", "token"))
INT8 = TensorSpec("int8", CHANNEL)
STATIC = TensorSpec("int8", TENSOR, symmetric=False)
DYNAMIC = TensorSpec("int8", TOKEN, dynamic=True)
SPECS = layer_specs(splits=(3, 5))


def plan() -> Plan:
    layers = {f"block.{index}": spec for index, spec in enumerate(SPECS)}
    layers["again"] = SPECS[0]
    return Plan("Net", layers, {"block.0": "has 8-bit weights"})


def test_plans_survive_json() -> None:
    text = json.dumps(plan().to_dict())
    assert Plan.from_dict(json.loads(text)) == plan()
    assert list(Plan.from_dict(json.loads(text)).layers) == list(plan().layers)
    assert json.dumps(Plan.from_dict(json.loads(text)).to_dict()) == text


def test_equal_specs_are_written_once() -> None:
    values = plan().to_dict()
    assert len(values["specs"]) == len(set(SPECS))
    assert values["layers"]["again"] == values["layers"]["block.0"]


def test_an_empty_plan_is_a_plan() -> None:
    empty = Plan("Net", {})
    assert Plan.from_dict(empty.to_dict()) == empty
    assert not empty.is_static()


@pytest.mark.parametrize(("low", "static"), [(None, False), (DYNAMIC, False), (STATIC, True)])
def test_plans_know_whether_calibration_is_needed(low: TensorSpec | None, static: bool) -> None:
    assert Plan("Net", {"a": LayerSpec(INT8), "b": LayerSpec(INT8, low)}).is_static() is static


@pytest.mark.parametrize("version", [PLAN_VERSION + 1, PLAN_VERSION - 1, None, "1"])
def test_plans_of_another_version_are_refused(version: object) -> None:
    text = f"plan version {version!r} cannot be read, only {PLAN_VERSION}; .*pip install -U"
    with pytest.raises(DQError, match=text):
        Plan.from_dict({**plan().to_dict(), "version": version})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layer": {}}, "unknown key of a plan 'layer'. Did you mean 'layers'?"),
        ({"layers": {"a": 10_000}}, "layer a refers to spec 10000 of"),
        ({"layers": {"a": -1}}, "layer a refers to spec -1 of"),
        ({"layers": {"a": "0"}}, "layer a refers to spec '0' of"),
        (
            {"specs": [INT8.to_dict()]},
            r"specs\[0\]: unknown key of a layer spec 'format'",
        ),
        (
            {"specs": [{"weight": {**INT8.to_dict(), "format": "int88"}}]},
            r"specs\[0\]: unknown format 'int88'. Did you mean 'int8'",
        ),
        ({"specs": [{}]}, r"specs\[0\]: a tensor spec needs the key 'format'"),
    ],
)
def test_plans_are_read_strictly(change: dict, text: str) -> None:
    with pytest.raises(DQError, match=text):
        Plan.from_dict({**plan().to_dict(), **change})


@pytest.mark.parametrize("key", ["model", "specs", "layers"])
def test_a_key_that_is_missing_is_named(key: str) -> None:
    values = plan().to_dict()
    del values[key]
    with pytest.raises(DQError, match=f"the plan has no '{key}'"):
        Plan.from_dict(values)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((STATIC,), "a weight is static, by channel or group"),
        ((DYNAMIC,), "a weight is static, by channel or group"),
        ((INT8, None, (4, 4)), "input_splits without a quantized input"),
        ((INT8, INT8), "a static input has granularity tensor or group, not channel"),
        (
            (INT8, TensorSpec("int8", TENSOR, dynamic=True)),
            r"a dynamic input has granularity token or group",
        ),
        (
            (INT8, TensorSpec("int8", TOKEN, symmetric=False, dynamic=True)),
            "a dynamic input is symmetric and signed",
        ),
        (
            (INT8, TensorSpec("uint8", TOKEN, dynamic=True)),
            "a dynamic input is symmetric and signed",
        ),
        ((INT8, DYNAMIC, (4, 4)), "input_splits need a static input"),
    ],
)
def test_what_does_not_go_together_in_a_layer_is_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(DQError, match=text):
        LayerSpec(*arguments)


def test_patterns_match_whole_names() -> None:
    names = ["a.attn2.to_k", "a.attn2.to_q", "b.attn2.to_v", "attn2.to_kv"]
    assert match("*.attn2.to_[kv]", names) == ("a.attn2.to_k", "b.attn2.to_v")
    assert match("a.attn2.to_q", iter(names)) == ("a.attn2.to_q",)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(DQError, match=r"unknown layer pattern 'a.to_q'. Did you mean 'a.to_k'\?"):
        match("a.to_q", ["a.to_k"])
    with pytest.raises(DQError, match="unknown layer pattern 'A'"):
        match("A", ["a"])


def test_the_written_form_shows_the_splits() -> None:
    assert str(LayerSpec(INT8)) == "int8 channel | float"
    text = "int8 channel | int8 tensor asymmetric split 3+5"
    assert str(LayerSpec(INT8, STATIC, (3, 5))) == text
