"""Processors keep their own code and find another attention in it."""

import copy
import pickle

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from dq import attention
from dq.attention import functions
from dq.distance import relative_error
from dq.kernels import attention as ways
from tests.models import MODELS, ModelCase
from tests.packed import forward


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that dq's attention was given."""
    seen: list[tuple[int, ...]] = []

    def noted(q, k, v, scale):
        seen.append(tuple(q.shape))
        return ways.attention(q, k, v, scale)

    monkeypatch.setattr(functions, "attention", noted)
    return seen


def processors(model: nn.Module) -> list[object]:
    return [m.processor for m in model.modules() if hasattr(m, "processor")]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    case: ModelCase = MODELS[request.param]
    return case.network(case.build()).to(torch.bfloat16)


def test_every_family_draws_the_same_with_it(
    model: nn.Module, calls: list[tuple[int, ...]]
) -> None:
    expected = forward(model)
    kinds = [type(p) for p in processors(model)]
    assert attention.install(model) == len(kinds) > 0
    assert relative_error(forward(model), expected) < 0.02
    assert len(calls) >= len(kinds)
    assert [type(p).__name__ for p in processors(model)] == [kind.__name__ for kind in kinds]
    assert attention.install(model) == 0  # twice is once
    attention.uninstall(model)
    assert [type(p) for p in processors(model)] == kinds
    assert torch.equal(forward(model), expected)


def test_float32_is_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    case = MODELS["sd32"]
    model = case.network(case.build())
    expected = forward(model)
    attention.install(model)
    assert torch.equal(forward(model), expected)
    assert calls == []


def test_masks_and_dropout_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    q, k, v = (torch.randn(1, 2, 8, 16).bfloat16() for _ in range(3))
    mask = torch.rand(1, 2, 8, 8) > 0.3
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        assert torch.equal(functions.scaled_dot_product_attention(q, k, v, **options), expected)
    assert calls == []
    y = functions.scaled_dot_product_attention(q, k, v, scale=0.1)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.1)
    assert relative_error(y, expected) < 0.01
    assert calls == [(1, 2, 8, 16)]


def test_masks_are_left_to_the_dispatcher(calls: list[tuple[int, ...]]) -> None:
    q, k, v = (torch.randn(1, 8, 2, 16).bfloat16() for _ in range(3))
    mask = torch.rand(1, 2, 8, 8) > 0.3
    expected = attention_dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
    assert torch.equal(functions.dispatch_attention_fn(q, k, v, mask), expected)
    assert torch.equal(functions.dispatch_attention_fn(q, k, v, attn_mask=mask), expected)
    assert calls == []


def test_a_backend_that_users_ask_diffusers_for_goes_first(calls: list[tuple[int, ...]]) -> None:
    q, k, v = (torch.randn(1, 8, 2, 16).bfloat16() for _ in range(3))
    ours = functions.dispatch_attention_fn(q, k, v, None, 0.0, False)
    assert calls == [(1, 2, 8, 16)]
    math = attention_dispatch.AttentionBackendName._NATIVE_MATH
    assert relative_error(functions.dispatch_attention_fn(q, k, v, backend=math), ours) < 0.01
    with attention_dispatch.attention_backend("_native_math"):
        functions.dispatch_attention_fn(q, k, v)
    assert len(calls) == 1


def test_processors_can_be_copied_and_pickled() -> None:
    case = MODELS["sd32"]
    model = case.network(case.build()).to(torch.bfloat16)
    attention.install(model)
    expected = forward(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(hasattr(p, "_dq_original") for p in processors(other))
        assert torch.equal(forward(other), expected)


def test_adapters_and_unknown_processors_stay() -> None:
    class Custom:
        def __call__(self, attn, hidden_states):
            return hidden_states

    model = nn.Module()
    model.one, model.two, model.three = nn.Module(), nn.Module(), nn.Module()
    model.one.processor = IPAdapterAttnProcessor2_0(8, 8)
    model.two.processor = custom = Custom()
    model.three.processor = AttnProcessor2_0()
    assert attention.install(model) == 1
    assert type(model.one.processor) is IPAdapterAttnProcessor2_0
    assert model.two.processor is custom
    assert isinstance(model.three.processor, AttnProcessor2_0)
