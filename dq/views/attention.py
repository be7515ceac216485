"""Attention maps before and after their tokens are put in order, and what is left out of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dq import attention
from dq.calibrate import Calibration, CalibrationSpec
from dq.errors import DQError
from dq.eval.grid import grid
from dq.eval.report import Page
from dq.full_precision import full_precision
from dq.kernels.block_sparse import Operands, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.nn.token_site import TokenSite
from dq.pipelines.draw import PipelineSource
from dq.tokens.orders import natural as natural_order

__all__ = ["SiteView", "run"]

_FORMATS = {
    "q k int8": Operands("int8"),
    "q k int8, p uint7 v int8": Operands("int8", "int8", "uint7"),
    "q k int8, p v e4m3": Operands("int8", "e4m3", "e4m3"),
    "q k int4, p uint4 v int4": Operands("int4", "int4", "uint4"),
}
_EDGE = 192  # pixels of a map
_TINT = torch.tensor([1.0, 0.8, 0.8])  # of blocks that are left out
_BRIGHT = 0.995  # quantile of a map that is drawn black


@dataclass(frozen=True)
class SiteView:
    """What is told of one attention.

    Attributes:
        name: Of the module.
        tokens: Their layout, in words.
        orders: Number of heads by order.
        density: Share of the blocks that is computed, of each head, in the step group that is
            shown.
        kept: Share of the probabilities that lies in them, likewise, in the call that is shown.
        maps: Of the heads that are shown: number and order, natural and ordered picture.
        errors: Relative L1 error of the output with operands rounded by block, nothing left out, by
            format: in natural order, and in that of each head.
    """

    name: str
    tokens: str
    orders: dict[str, int]
    density: tuple[float, ...]
    kept: tuple[float, ...]
    maps: tuple[tuple[str, Image.Image, Image.Image], ...]
    errors: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without pictures."""
        return {k: v for k, v in vars(self).items() if k != "maps"}

    def error_row(self) -> dict[str, object]:
        """Return the line of the table of errors."""
        words = {n: f"{100 * a:.2f} | {100 * b:.2f}" for n, (a, b) in self.errors.items()}
        return {"attention": self.name, **words}

    def row(self) -> dict[str, object]:
        """Return the line of a table."""
        return {
            "attention": self.name,
            "tokens": self.tokens,
            "heads by order": ", ".join(f"{n} {order}" for order, n in self.orders.items()),
            "blocks computed": _range(self.density),
            "probability in them": _range(self.kept),
        }


def _range(shares: Sequence[float]) -> str:
    mean = sum(shares) / len(shares)
    return f"{100 * mean:.1f} % ({100 * min(shares):.0f} to {100 * max(shares):.0f} by head)"


def run(
    pipe: Any,
    output: Path,
    heads: int = 3,
    steps: int = 8,
    seed: int = 0,
    size: tuple[int, ...] = (),
) -> list[SiteView]:
    """Draw one image, look at the maps in the middle of its steps, and write a page.

    Args:
        pipe: A pipeline whose attentions have ordered tokens.
        output: The page.
        heads: Shown of each attention: those that move most first.
        steps: Denoising steps of the image.
        seed: Of the image.
        size: Of the image; none for the pipeline's own.

    Returns:
        What the page says, an entry an attention.

    Raises:
        DQError: If no attention has ordered tokens.
    """
    model = pipe.denoiser
    found = {name: attention.site_of(model.get_submodule(name)) for name in attention.sites(model)}
    sites = {name: site for name, site in found.items() if site is not None}
    if not sites:
        raise DQError(
            f"no attention of this {type(model).__name__} has ordered tokens; use a recipe such as "
            "paro-50, or a checkpoint made with one"
        )
    spec = CalibrationSpec(n=1, steps=steps, batch=1, seed=seed, size=size)
    calibration = Calibration(model, PipelineSource(pipe), spec)
    calls = [call for batch in calibration.batches() for call in batch]
    views: dict[str, SiteView] = {}

    def see(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        last = q[-1:].float(), k[-1:].float(), v[-1:].float()
        map = (last[0][0] @ last[1][0].mT * scale).softmax(-1)
        errors = _errors(sites[name], *last, scale)
        views[name] = _view(name, sites[name], map, heads, errors)

    with full_precision(model), attention.tapped(model, sites, see):
        next(iter(calibration.replay([calls[len(calls) // 2]])))
    shown = [views[name] for name in sites if name in views]
    _write(type(model).__name__, shown, output)
    return shown


def _errors(
    site: TokenSite, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> dict[str, tuple[float, float]]:
    """Return the relative L1 error of rounded operands, all blocks, natural and ordered."""
    blocks = site.live()
    every = torch.ones_like(blocks.live)
    natural = site.spec.table(natural_order(site.spec.layout.grid)).to(blocks.table.device)
    tables = natural.expand_as(blocks.table).contiguous(), blocks.table
    orders = [LiveBlocks(table, every, site.spec.block) for table in tables]
    exact = F.scaled_dot_product_attention(q, k, v, scale=scale)
    found = {}
    for words, operands in _FORMATS.items():
        made = (ways["by-block"].run(q, k, v, scale, order, operands) for order in orders)
        one, other = (float((y - exact).abs().sum() / exact.abs().sum()) for y in made)
        found[words] = one, other
    return found


def _view(
    name: str, site: TokenSite, map: Tensor, heads: int, errors: dict[str, tuple[float, float]]
) -> SiteView:
    """Look at the map of one attention, `(H, N, N)`, as the masks of its step group see it."""
    group = site.group() if site.steps is not None else 0
    blocks = site.live(group if isinstance(group, int) else int(group[-1]))
    ordered = _ordered(map, blocks)
    mask = blocks.mask & blocks.there[:, :, None]
    kept = ((ordered * mask).sum((1, 2)) / ordered.sum((1, 2))).tolist()
    orders = site.token_order.tolist()
    names = [site.spec.orders[order] for order in orders]
    # Those in an order of their own first, then as they come.
    shown = sorted(range(len(orders)), key=lambda head: (orders[head] == 0, head))[:heads]
    return SiteView(
        name,
        str(site.spec.layout),
        dict(Counter(names)),
        tuple(blocks.live.float().mean((1, 2)).tolist()),
        tuple(kept),
        tuple(
            (f"head {h}: {names[h]}", _picture(map[h]), _picture(ordered[h], mask[h]))
            for h in sorted(shown)
        ),
        errors,
    )


def _ordered(map: Tensor, blocks: LiveBlocks) -> Tensor:
    """Return maps with rows and columns at their places, `(H, L, L)`; zero where no token is."""
    heads = torch.arange(len(map), device=map.device)[:, None, None]
    moved = map[heads, blocks.gather[:, :, None], blocks.gather[:, None, :]]
    return moved * (blocks.there[:, :, None] & blocks.there[:, None, :])


def _picture(map: Tensor, mask: Tensor | None = None) -> Image.Image:
    """Draw a map, large probabilities dark, blocks that are left out tinted."""
    small = F.adaptive_avg_pool2d(map[None].cpu(), min(_EDGE, len(map)))[0]
    shade = (small / small.flatten().quantile(_BRIGHT).clamp_min(1e-12)).clamp(0, 1).sqrt()
    light = (1 - shade)[..., None].expand(-1, -1, 3)
    if mask is not None:
        left_out = F.adaptive_max_pool2d(mask[None].float().cpu(), len(small))[0] == 0
        light = torch.where(left_out[..., None], light * _TINT, light)
    return Image.fromarray((light * 255).byte().numpy())


def _write(model: str, views: Sequence[SiteView], output: Path) -> None:
    page = Page(f"dq attention: {model}")
    page.text(
        "Rows are queries, columns keys, dark is a large probability; one image, in the middle of "
        "its steps. Ordered maps have the tokens of each head in its own order, and are tinted "
        "where blocks are left out."
    )
    page.table([view.row() for view in views])
    page.heading("Operands rounded by block")
    page.text(
        "Relative L1 error of each attention's output with all blocks computed, in the natural "
        "order and in that of each head, in percent."
    )
    page.table([view.error_row() for view in views])
    for view in views:
        page.heading(f"{view.name}: {view.tokens}")
        rows = {
            "natural": [natural for _, natural, _ in view.maps],
            "ordered": [ordered for _, _, ordered in view.maps],
        }
        page.image(grid(rows, [label for label, _, _ in view.maps], _EDGE), view.name)
    page.write(output)
