"""Sums of signs: x ~ offset + sum_i scale_i * b_i with every b_i -1 or +1, a scale each a block.

One basis is XNOR-Net's binary weight (Rastegari et al. 2016, arXiv 1603.05279), two are those of
BinaryDM (Zheng et al. 2025, arXiv 2404.05662). Bit i of a code is the sign of basis i, 1 for +1,
and sign(0) is +1. What is here sees blocks `(r, g, n)` of n elements that share their scales, as
`dq.quantize` cuts them; the offset is kept as the zero of the first basis, -offset / scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.scales import Scales, positive

__all__ = ["decode_signs", "encode_signs", "fit_signs", "greedy_signs", "signs"]

_ROUNDS = 8  # of least squares; more change the error of a normal distribution by less than 0.1 %


def signs(x: Tensor) -> Tensor:
    """Return -1 for what is below 0, +1 for the rest, in the dtype of `x`."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _parts(scales: Scales) -> tuple[Tensor | None, list[Tensor]]:
    """Return the offset and the scale of each basis, `(r, g, 1)`."""
    every = [scales.step]
    if scales.more is not None:
        every += scales.more.unbind(-1)
    offset = None if scales.zero is None else -scales.zero * scales.step
    return None if offset is None else offset.unsqueeze(-1), [s.unsqueeze(-1) for s in every]


def _plane(codes: Tensor, index: int) -> Tensor:
    """Return the signs of one basis, float32."""
    return ((codes >> index) & 1).float().mul(2).sub(1)


def encode_signs(x: Tensor, scales: Scales) -> Tensor:
    """Return the codes of the sums nearest to some values; ties go up.

    Args:
        x: `(r, g, n)` float32.
        scales: Of them.

    Returns:
        uint8 of the same shape.
    """
    offset, every = _parts(scales)
    if len(every) == 1:
        return (x >= (0.0 if offset is None else offset)).to(torch.uint8)
    codes = torch.arange(1 << len(every), dtype=torch.uint8, device=x.device)
    sums = decode_signs(codes.expand(*scales.step.shape, -1), scales)
    sums, order = sums.sort(dim=-1, stable=True)
    middles = (sums[..., 1:] + sums[..., :-1]) / 2
    index = torch.searchsorted(
        middles.expand(*x.shape[:2], -1).contiguous(), x.contiguous(), right=True
    )
    return order.expand(*x.shape[:2], -1).gather(-1, index).to(torch.uint8)


def decode_signs(codes: Tensor, scales: Scales) -> Tensor:
    """Return the float32 values `(r, g, n)` that uint8 codes stand for."""
    offset, every = _parts(scales)
    total: Tensor | None = None if offset is None else offset.expand(codes.shape)
    for index, scale in enumerate(every):
        term = _plane(codes, index) * scale
        total = term if total is None else total + term
    assert total is not None  # there is at least one basis
    return total


def greedy_signs(x: Tensor, bases: int, offset: bool = False) -> Scales:
    """Return the scales that fit one basis after the other: the means of what is left.

    Args:
        x: `(r, g, n)` float32.
        bases: How many.
        offset: Whether the mean of each block is taken out first.

    Returns:
        `(r, g)`, further ones `(r, g, bases - 1)`.
    """
    middle = x.mean(-1, keepdim=True) if offset else None
    left = x if middle is None else x - middle
    found = []
    for _ in range(bases):
        scale = left.abs().mean(-1, keepdim=True)
        left = left - scale * signs(left)
        found.append(scale.squeeze(-1))
    return _scales(found, None if middle is None else middle.squeeze(-1))


def fit_signs(x: Tensor, bases: int, offset: bool = False) -> Scales:
    """Return the scales of least squared error, as far as turns of signs and scales find them.

    From the greedy ones on, signs and the scales that fit them best take turns (alternating least
    squares). One basis without offset is exact from the beginning.

    Args:
        x: `(r, g, n)` float32.
        bases: How many.
        offset: Whether blocks have an offset.
    """
    scales = greedy_signs(x, bases, offset)
    if bases == 1 and not offset:
        return scales
    for _ in range(_ROUNDS):
        codes = encode_signs(x, scales)
        planes = [_plane(codes, index) for index in range(bases)]
        planes += [torch.ones_like(x)] if offset else []
        design = torch.stack(planes, -1)  # (r, g, n, bases + offset)
        # Signs that are all equal say the same as the offset: a little on the diagonal decides.
        gram = design.mT @ design + 1e-4 * torch.eye(design.shape[-1], device=x.device)
        found = torch.linalg.solve(gram, design.mT @ x.unsqueeze(-1)).squeeze(-1)
        middle = found[..., -1] if offset else None
        # A negative scale is a positive one with all its signs turned.
        ordered = found[..., :bases].abs().sort(-1, descending=True).values
        scales = _scales(list(ordered.unbind(-1)), middle)
    return scales


def _scales(found: list[Tensor], offset: Tensor | None) -> Scales:
    first = positive(found[0])
    zero = None if offset is None else -offset / first
    more = torch.stack(found[1:], -1) if len(found) > 1 else None
    return Scales(first, zero, None, more)
