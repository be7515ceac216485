import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dq.calls import Call, captured, flatten, run, unflatten
from dq.errors import DQError

NAMES = st.text("abcde_", min_size=1, max_size=4)
TENSORS = st.integers(0, 9).map(lambda n: torch.full((2,), float(n)))
VALUES = st.recursive(
    TENSORS,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=12).map(tuple),
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if type(a) is not type(b) or len(a) != len(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b))


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_calls_become_tensors_and_again_calls(call: Call) -> None:
    flat = flatten(call)
    assert all(isinstance(value, torch.Tensor) for value in flat.values())
    assert same(unflatten(flat), call)


def test_nothing_is_left_out_and_numbers_are_tensors() -> None:
    flat = flatten({"timestep": 3, "mask": None, "added": {"ids": None, "scale": 0.5}})
    assert flat == {"timestep": torch.tensor(3), "added.scale": torch.tensor(0.5)}


@pytest.mark.parametrize(("value", "kind"), [([1], "list"), ("cat", "str"), (object(), "object")])
def test_what_cannot_be_stored_is_named(value: object, kind: str) -> None:
    with pytest.raises(DQError, match=f"argument 'extra' of the denoiser is a {kind}: calib"):
        flatten({"extra": value})


class Doubled(nn.Linear):
    """Returns a tensor itself, and has no choice."""

    def forward(self, x, factor=2):
        return super().forward(x) * factor


class Chosen(Doubled):
    def forward(self, x, factor=2, return_dict=True):
        y = super().forward(x, factor)
        return {"sample": y} if return_dict else (y,)


@pytest.mark.parametrize("kind", [Doubled, Chosen])
def test_captured_calls_are_made_again(kind: type[Doubled]) -> None:
    torch.manual_seed(0)
    model, calls = kind(3, 2), []
    x = torch.randn(4, 3)
    with captured(model, calls):
        model(x, 5)
        model(x=x)
    model(x)  # not any more
    expected = nn.Linear.forward(model, x)
    assert [sorted(call) for call in calls] == [["factor", "x"], ["x"]]
    for call, factor in zip(calls, (5, 2), strict=True):
        assert torch.equal(run(model, call), expected * factor)
    x.zero_()  # what was captured is a copy
    assert torch.equal(run(model, calls[1]), expected * 2)
