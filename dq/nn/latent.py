"""Weights that are learned under their quantizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FullWeight", "LowRankWeight"]


class FullWeight(nn.Module):
    """Every weight by itself.

    Args:
        start: `(N, K)` floating point.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.detach().float().clone())

    def forward(self) -> Tensor:
        """Return the matrix that is to be quantized, `(N, K)` float32."""
        return self.value


class LowRankWeight(nn.Module):
    """A frozen matrix plus a product of two thin ones, merged before it is quantized.

    For models too large to learn every weight (EfficientDM, He et al. 2024, arXiv 2310.03270,
    section 3.2): nothing of it is left when the layer is packed.

    Args:
        start: `(N, K)` floating point.
        rank: Of the product.
        generator: Of the first factor; the other begins with zeros.
    """

    start: Tensor

    def __init__(self, start: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = start.shape
        self.register_buffer("start", start.detach().float())
        down = torch.randn(rank, columns, generator=generator).to(start.device)
        self.down = nn.Parameter(down / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=start.device))

    def forward(self) -> Tensor:
        """Return the matrix that is to be quantized, `(N, K)` float32."""
        return self.start + self.up @ self.down
