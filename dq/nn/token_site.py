"""What an attention with ordered tokens stores: an order and block masks for each head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.kernels.block_sparse import live_blocks
from dq.kernels.kernel import stamp_of
from dq.kernels.live_blocks import LiveBlocks
from dq.nn.steps import Steps
from dq.tokens.choice import Chosen
from dq.tokens.spec import TokenSpec

__all__ = ["SITE", "TOKEN_TENSORS", "TokenSite"]

SITE = "dq_tokens"  # name of the module below the attention that it belongs to
TOKEN_TENSORS = ("token_order", "block_mask")


class TokenSite(nn.Module):
    """Knows where tokens go, and which blocks count at the timestep of the call.

    Attributes:
        spec: Layout, candidate orders, size of blocks, step groups.
        token_order: `(H,)` uint8, which of the orders each head has.
        block_mask: `(G, H, bytes)` uint8, packed bits: one a block of image queries and image keys.
        steps: Knows the timestep, where masks depend on it.
    """

    token_order: Tensor
    block_mask: Tensor

    def __init__(
        self, spec: TokenSpec, chosen: Chosen | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.steps: Steps | None = None
        self._ready: dict[tuple[Any, ...], LiveBlocks] = {}
        orders = torch.empty(spec.heads, dtype=torch.uint8, device=device)
        masks = torch.empty(spec.mask_shape, dtype=torch.uint8, device=device)
        if chosen is not None:
            orders = chosen.orders.to(torch.uint8)
            masks = spec.packed(chosen.masks)
        if masks.shape != spec.mask_shape or orders.shape != (spec.heads,):
            raise DQError(
                f"masks {tuple(masks.shape)} and orders {tuple(orders.shape)} are not those of "
                f"{spec.heads} heads and {spec}"
            )
        self.register_buffer("token_order", orders)
        self.register_buffer("block_mask", masks)

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to know the timestep."""
        return bool(self.spec.groups)

    def masks(self) -> Tensor:
        """Return the masks of image queries and image keys, `(G, H, q, k)` bool."""
        return self.spec.unpacked(self.block_mask)

    def live(self, group: int = 0) -> LiveBlocks:
        """Return order and mask of a step group; kept until they change or move."""
        key = group, *stamp_of(self.block_mask, self.token_order)
        if key not in self._ready:
            made = live_blocks(self.spec, self.token_order, self.block_mask, group)
            self._ready = {key: made}  # the last one only: steps come in order
        return self._ready[key]

    def density(self) -> float:
        """Return the share of the blocks that is computed, those of text among them."""
        queries, keys = self.spec.blocks
        masks = self.masks()
        left_out = int((~masks).sum())
        return 1 - left_out / (masks.shape[0] * masks.shape[1] * queries * keys)

    def group(self) -> int | Tensor:
        """Return the step group of the call; `(B,)` where its rows are at different steps."""
        if not self.spec.groups:
            return 0
        if self.steps is None:
            raise DQError("this attention depends on the timestep: call it through its denoiser")
        return self.steps.nearest(self.spec.groups)

    def check(self, q: Tensor, k: Tensor) -> None:
        """Refuse operands of other tokens than those that the masks are for.

        Args:
            q: `(B, H, N, D)`.
            k: `(B, H, M, D)`.

        Raises:
            DQError: If there are more or fewer, or other numbers of heads.
        """
        if q.shape[1] != self.spec.heads or k.shape[1] != self.spec.heads:
            raise DQError(f"masks of {self.spec.heads} heads, the call has {q.shape[1]}")
        tokens = self.spec.layout.tokens
        if q.shape[2] != tokens or k.shape[2] != tokens:
            raise DQError(
                f"this attention was calibrated for {self.spec.layout}, {tokens} tokens; the call "
                f"has {q.shape[2]} queries and {k.shape[2]} keys. Draw images of that size, or "
                "quantize again at this one"
            )

    def extra_repr(self) -> str:
        """Return the spec for `repr`."""
        return f"{self.spec}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._ready = {}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made again."""
        return {**self.__dict__, "_ready": {}}
