"""Where the tokens of an attention come from: a grid of image tokens, and those of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.errors import DQError
from dq.tokens.orders import places

__all__ = ["TokenLayout"]


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a joint sequence: image tokens row by row, text beside them.

    Args:
        grid: (height, width) of an image, (frames, height, width) of a video.
        text: Number of text tokens.
        text_first: Whether they come before those of the image.

    Example:
        >>> TokenLayout((2, 2), text=1, text_first=True).table("wh", 4)
        tensor([ 1,  3,  2,  4,  0, -1, -1, -1], dtype=torch.int32)
    """

    grid: tuple[int, ...]
    text: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        if len(self.grid) not in (2, 3) or min(self.grid) < 1:
            raise DQError(f"a grid is (height, width) or (frames, height, width), not {self.grid}")
        if self.text < 0:
            raise DQError(f"text is a number of tokens, not {self.text}")

    @property
    def image(self) -> int:
        """Number of image tokens."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return self.image + self.text

    def table(self, order: str, unit: int) -> Tensor:
        """Return which token comes to each place, so that no block holds both image and text.

        The image comes first, in the order asked for and padded to whole blocks, then the text,
        padded likewise: attention does not care about the order of keys, and this way text rows
        and columns are blocks of their own.

        Args:
            order: Of the image tokens; see `dq.tokens.orders`.
            unit: Tokens of a block.

        Returns:
            `(L,)` int32, -1 where nothing comes.
        """
        image = places(order, self.grid) + (self.text if self.text_first else 0)
        first = 0 if self.text_first else self.image
        text = torch.arange(first, first + self.text)
        parts = [torch.nn.functional.pad(p, (0, -len(p) % unit), value=-1) for p in (image, text)]
        return torch.cat(parts).int()

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        if not self.text:
            return grid
        return f"{self.text} text + {grid}" if self.text_first else f"{grid} + {self.text} text"
