import pytest

from dq.attention_spec import AttentionSpec
from dq.errors import DQError
from dq.plan import LayerSpec, Plan
from dq.spec import Granularity, TensorSpec

TOKEN = Granularity("token")
INT8 = TensorSpec("int8", TOKEN, dynamic=True)
UINT8 = TensorSpec("uint8", TOKEN, dynamic=True)


@pytest.mark.parametrize(
    "spec",
    [AttentionSpec(INT8), AttentionSpec(INT8, INT8, UINT8), AttentionSpec(None, INT8, UINT8)],
)
def test_json_and_words(spec: AttentionSpec) -> None:
    assert AttentionSpec.from_dict(spec.to_dict()) == spec
    assert ("int8" in str(spec)) and (("float" in str(spec)) == (len(spec.to_dict()) < 3))
    layer = LayerSpec(TensorSpec("int8", Granularity("channel")))
    plan = Plan("M", {"a": layer}, attention={"b": spec, "c": spec})
    assert Plan.from_dict(plan.to_dict()) == plan
    assert len(plan.to_dict()["attention"]["specs"]) == 1
    assert "attention" not in Plan("M", {"a": layer}).to_dict()


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((), "changes nothing"),
        ((INT8, INT8), "values and probabilities are quantized together"),
        ((INT8, INT8, INT8), "probabilities alone are unsigned"),
        ((UINT8,), "probabilities alone are unsigned: query_key is not uint8"),
        ((TensorSpec("int8", Granularity("tensor")),), "query_key is dynamic by token"),
        ((TensorSpec("int8", Granularity("group", 8), dynamic=True),), "dynamic by token"),
    ],
)
def test_what_no_product_could_use_is_refused(parts: tuple[TensorSpec, ...], text: str) -> None:
    with pytest.raises(DQError, match=text):
        AttentionSpec(*parts)


def test_bad_files_say_where() -> None:
    with pytest.raises(DQError, match="unknown key of an attention spec 'keys'"):
        AttentionSpec.from_dict({"keys": INT8.to_dict()})
    values = Plan("M", {}, attention={"b": AttentionSpec(INT8)}).to_dict()
    values["attention"]["sites"]["b"] = 3
    with pytest.raises(DQError, match="attention: attention b refers to spec 3 of 1"):
        Plan.from_dict(values)
