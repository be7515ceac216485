"""Attention with rounded operands, against the definition written out."""

import pytest
import torch
from torch.nn import functional as F

from dq.attention_spec import AttentionSpec
from dq.nn.operands import quantized_attention
from dq.spec import Granularity, TensorSpec

TOKEN = Granularity("token")


def spec(bits: int) -> AttentionSpec:
    low = TensorSpec(f"int{bits}", TOKEN, dynamic=True)
    return AttentionSpec(low, low, TensorSpec(f"uint{bits}", TOKEN, dynamic=True))


def qkv(tokens: int = 9, keys: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, tokens, 16), (2, 3, keys, 16), (2, 3, keys, 16)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers times scales, head by head."""
    top = 2 ** (bits - 1) - 1
    out = torch.empty(*q.shape[:-1], v.shape[-1])
    for b in range(len(q)):
        for h in range(q.shape[1]):
            sq, sk = (t[b, h].abs().amax(1, keepdim=True) / top for t in (q, k))
            scores = torch.round(q[b, h] / sq) @ torch.round(k[b, h] / sk).T
            p = (scores * sq * sk.T * q.shape[-1] ** -0.5).softmax(-1)
            sp = p.amax(1, keepdim=True) / (2**bits - 1)
            sv = v[b, h].abs().max() / top
            out[b, h] = (torch.round(p / sp) @ torch.round(v[b, h] / sv)) * sp * sv
    return out


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_integer_products_with_scales(bits: int) -> None:
    q, k, v = qkv()
    found = quantized_attention(q, k, v, 0.25, spec(bits))
    assert torch.allclose(found, by_hand(q, k, v, bits), atol=1e-5)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert 0 < (found - exact).norm() / exact.norm() < (0.02 if bits == 8 else 0.35)


def test_masks_hide_keys() -> None:
    q, k, v = qkv()
    mask = torch.ones(9, 7, dtype=torch.bool)
    mask[:, 5:] = False
    hidden = quantized_attention(q, k, v, 0.25, AttentionSpec(spec(8).query_key), mask)
    fewer = quantized_attention(q, k[:, :, :5], v[:, :, :5], 0.25, AttentionSpec(spec(8).query_key))
    assert torch.allclose(hidden, fewer, atol=1e-6)
    added = torch.zeros(9, 7).masked_fill(~mask, -torch.inf)
    again = quantized_attention(q, k, v, 0.25, AttentionSpec(spec(8).query_key), added)
    assert torch.equal(again, hidden)


def test_gradients_pass_straight_through() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    quantized_attention(q, k, v, 0.25, spec(8)).square().sum().backward()
    mine = [t.grad for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    F.scaled_dot_product_attention(q, k, v).square().sum().backward()
    for found, t in zip(mine, (q, k, v), strict=True):
        assert (found - t.grad).norm() / t.grad.norm() < 0.05
