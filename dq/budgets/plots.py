"""Pictures of a model's sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dq.budgets.front import Point
from dq.presets import FLOAT
from dq.sensitivity.table import CONTENT, QUALITY, Table, decibels

__all__ = ["bit_map", "fronts", "layers"]

_COLOURS = {CONTENT: "#d07a2d", QUALITY: "#2a7f62"}
_FLOAT_COLOUR = "#222222"
# By bits of a weight, from few to many: dark red to dark blue by way of grey.
_BITS = {
    1: "#67000d", 2: "#b2182b", 3: "#ef8a62", 4: "#fddbc7",
    5: "#d1e5f0", 6: "#67a9cf", 7: "#4393c3", 8: "#2166ac",
}  # fmt: skip
_WIDTH, _LEFT, _TOP = 1040, 70, 26


def _sheet(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (_WIDTH, height), "white")
    return sheet, ImageDraw.Draw(sheet)


def layers(table: Table, kind: str, format: str) -> Image.Image:
    """Draw what one format does to each layer, in the order in which layers run.

    Args:
        table: Noise by layer and format.
        kind: "weight" or "input".
        format: Name of the format; layers that it does not fit have no bar.
    """
    height, bottom = 230, 24
    sheet, pen = _sheet(height)
    font = ImageFont.load_default(12)
    noise = [(row.group, getattr(row, kind).get(format)) for row in table.rows]
    values = [decibels(value) for _, value in noise if value]
    if not values:
        return sheet
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    step = (_WIDTH - _LEFT - 10) / len(noise)

    def y(value: float) -> float:
        return _TOP + (value - low) / max(high - low, 1) * (height - _TOP - bottom)

    pen.text((_LEFT, 6), f"{kind} {format} alone: signal to noise of the output, dB", "black", font)
    for mark in range(low, high + 1, 10):
        pen.line((_LEFT, y(mark), _WIDTH - 10, y(mark)), fill="#ddd")
        pen.text((_LEFT - 6, y(mark)), str(mark), "black", font, anchor="rm")
    for index, (group, value) in enumerate(noise):
        if value:
            left = _LEFT + index * step
            box = (left, y(decibels(value)), left + max(step - 1, 1), y(high))
            pen.rectangle(box, fill=_COLOURS[group])
    _legend(pen, font, height - 16, list(_COLOURS.items()))
    return sheet


def _legend(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    top: float,
    entries: Sequence[tuple[str, str]],
) -> None:
    x = float(_LEFT)
    for words, colour in entries:
        pen.rectangle((x, top, x + 10, top + 10), fill=colour, outline="#999")
        pen.text((x + 15, top - 2), words, "black", font)
        x += 30 + font.getlength(words)


def bit_map(table: Table, points: Sequence[Point], bits: dict[str, int]) -> Image.Image:
    """Draw the weight format of each layer, a line a choice; dots mark float inputs.

    Args:
        table: Names the layers in order.
        points: The choices.
        bits: Width of each weight format.
    """
    line = 22
    sheet, pen = _sheet(_TOP + line * len(points) + 26)
    font = ImageFont.load_default(12)
    pen.text((_LEFT, 6), "bits of the weights, layer by layer", "black", font)
    step = (_WIDTH - _LEFT - 10) / len(table.rows)
    for index, point in enumerate(points):
        top = _TOP + index * line
        pen.text((_LEFT - 6, top + line / 2), point.name, "black", font, anchor="rm")
        for place, row in enumerate(table.rows):
            weight, input = point.choice[row.name]
            left = _LEFT + place * step
            colour = _FLOAT_COLOUR if weight == FLOAT else _BITS[bits[weight]]
            pen.rectangle((left, top, left + max(step - 0.5, 1), top + line - 3), fill=colour)
            if weight != FLOAT and input == FLOAT and table.rows[0].input:
                middle = left + step / 2
                pen.ellipse((middle - 2, top + 7, middle + 2, top + 11), fill="black")
    used = sorted({bits[w] for p in points for w, _ in p.choice.values() if w != FLOAT})
    entries = [*((str(width), _BITS[width]) for width in used), (FLOAT, _FLOAT_COLOUR)]
    _legend(pen, font, sheet.height - 18, entries)
    return sheet


def fronts(lines: dict[str, Sequence[Point]]) -> Image.Image:
    """Draw signal to noise against size: predicted as circles, real as dots.

    Args:
        lines: Points by what connects them.
    """
    height, bottom = 340, 44
    sheet, pen = _sheet(height)
    font = ImageFont.load_default(12)
    points = [point for line in lines.values() for point in line]
    values = [decibels(v) for p in points for v in (p.predicted, p.real)]
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil(max(values) / 5)
    sizes = [point.bytes / 1e6 for point in points]
    first, last = min(sizes), max(sizes)

    def place(size: float, value: float) -> tuple[float, float]:
        x = _LEFT + 20 + (size - first) / max(last - first, 1e-9) * (_WIDTH - _LEFT - 120)
        return x, height - bottom - (value - low) / max(high - low, 1) * (height - _TOP - bottom)

    pen.text((_LEFT, 6), "signal to noise of the output, dB", "black", font)
    for mark in range(low, high + 1, 5):
        _, y = place(first, mark)
        pen.line((_LEFT, y, _WIDTH - 10, y), fill="#ddd")
        pen.text((_LEFT - 6, y), str(mark), "black", font, anchor="rm")
    colours = ("#2a7f62", "#c0504d", "#7f7f7f")
    for (_, line), colour in zip(lines.items(), colours, strict=False):
        for kind in ("predicted", "real"):
            spots = [
                (*place(p.bytes / 1e6, decibels(getattr(p, kind))), p)
                for p in sorted(line, key=lambda p: p.bytes)
            ]
            if kind == "real" and len(spots) > 1:
                pen.line([(x, y) for x, y, _ in spots], fill=colour, width=2)
            for x, y, point in spots:
                fill = colour if kind == "real" else None
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=fill, outline=colour)
                if kind == "real":
                    pen.text((x + 7, y + 8), point.name, "black", font, anchor="lm")
    for size in (first, last):
        x, _ = place(size, low)
        pen.text((x, height - bottom + 6), f"{size:.2f} MB", "black", font, anchor="ma")
    entries = [*zip(lines, colours, strict=False)]
    _legend(pen, font, height - 18, entries)
    pen.text((_WIDTH - 230, height - 20), "dots: real, circles: predicted", "black", font)
    return sheet
