"""Quality against bits: one point a checkpoint, one panel a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["curve"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 330, 220, 62, 56, 28, 36
_COLOUR = "#2a7f62"

Point = tuple[str, float, float]


def curve(panels: Mapping[str, Sequence[Point]]) -> Image.Image:
    """Draw metrics against average bits a weight.

    Args:
        panels: By metric, points of (name, bits, value).
    """
    sheet = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), "white")
    for index, (metric, points) in enumerate(panels.items()):
        sheet.paste(_panel(metric, points), (_WIDTH * index, 0))
    return sheet


def _panel(metric: str, points: Sequence[Point]) -> Image.Image:
    font = ImageFont.load_default(12)
    panel = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(panel)
    low, high = _range([value for _, _, value in points])
    first, last = _range([bits for _, bits, _ in points])

    def place(bits: float, value: float) -> tuple[float, float]:
        x = _LEFT + (bits - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y

    pen.text((_LEFT, 6), metric, fill="black", font=font)
    pen.text((_WIDTH // 2, _HEIGHT - 16), "bits a weight", fill="black", font=font, anchor="ma")
    corner = place(first, low)
    pen.line((*corner, *place(last, low)), fill="#999")
    pen.line((*corner, *place(first, high)), fill="#999")
    for value in (low, high):
        x, y = place(first, value)
        pen.text((x - 6, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
    for bits in (first, last):
        x, y = place(bits, low)
        pen.text((x, y + 4), f"{bits:.1f}", fill="black", font=font, anchor="ma")
    for name, bits, value in points:
        x, y = place(bits, value)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_COLOUR)
        pen.text((x + 7, y), name, fill="black", font=font, anchor="lm")
    return panel


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return limits a little wider than the values."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin
