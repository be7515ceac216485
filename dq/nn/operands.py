"""Attention with quantized operands, simulated in floating point and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.attention_spec import AttentionSpec
from dq.nn.quantizer import Quantizer
from dq.spec import TensorSpec

__all__ = ["quantized_attention"]


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    spec: AttentionSpec,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `softmax(scale * q k^T + mask) v` with operands rounded as the spec says.

    Takes memory for all scores at once.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, M, D)`.
        v: `(B, H, M, E)`.
        scale: Of the scores.
        spec: How operands are quantized.
        mask: `(..., N, M)`: bool, where False hides a key, or floating point that is added.

    Returns:
        `(B, H, N, E)` in the dtype of `v`.
    """
    scores = (_rounded(q, spec.query_key, -1) @ _rounded(k, spec.query_key, -1).mT) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.float()
    probabilities = _rounded(scores.softmax(-1), spec.probabilities, -1)
    return (probabilities @ _rounded(v, spec.value, -2)).to(v.dtype)


def _rounded(x: Tensor, spec: TensorSpec | None, first: int) -> Tensor:
    """Fake-quantize with a scale for everything from dimension `first` on; float32."""
    if spec is None:
        return x.float()
    return Quantizer(spec)(x.reshape(x.shape[:first].numel(), -1)).view(x.shape)
