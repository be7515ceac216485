"""The backend of 8 bits in diffusers' dispatcher, as users switch it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.nn import functional as F

import dq  # noqa: F401 - the backend is there with it
from dq.attention.dispatcher import attention_of_8_bits
from tests.models import MODELS, VIDEOS
from tests.packed import relative_error


@pytest.fixture(autouse=True)
def _native_again() -> Iterator[None]:
    """diffusers switches the whole process."""
    yield
    native = attention_dispatch.AttentionBackendName.NATIVE
    attention_dispatch._AttentionBackendRegistry.set_active_backend(native)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_model_takes_the_backend_by_name(name: str) -> None:
    from dq.calls import run
    from dq.family import family_of

    case = {**MODELS, **VIDEOS}[name]
    model: Any = case.network(case.build()).eval()
    inputs = family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = run(model, inputs)
        model.set_attention_backend("dq_int8")
        found = run(model, inputs)
    assert 0 < relative_error(found, expected) < 0.02


@pytest.mark.parametrize("extra", ["mask", "causal", "other keys", "plain"])
def test_what_it_does_not_know_is_left_to_torch(extra: str) -> None:
    torch.manual_seed(0)
    keys = 20 if extra == "other keys" else 50
    q, k, v = (torch.randn(2, n, 3, 16) for n in (50, keys, keys))
    options: dict[str, Any] = {}
    if extra == "mask":
        options["attn_mask"] = torch.rand(2, 1, 50, 50) < 0.7
    if extra == "causal":
        options["is_causal"] = True
    made = attention_of_8_bits(q, k, v, **options)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    wanted = F.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)
    if extra == "plain":
        assert 0 < relative_error(made, wanted) < 0.02
    else:
        assert torch.equal(made, wanted)
