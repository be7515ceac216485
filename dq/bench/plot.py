"""A benchmark as a picture: a bar a variant, against bfloat16."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dq.bench.report import Report

__all__ = ["plot"]

_ROW, _MARGIN, _BAR = 22, 12, 560
_FASTER, _SLOWER, _PLAIN = "#2a7f62", "#c0504d", "#7f7f7f"


def plot(report: Report, file: Path) -> None:
    """Draw the times of all variants relative to bf16 of the same mode, and save the picture.

    Args:
        report: What was measured.
        file: With the extension of a picture format.
    """
    font = ImageFont.load_default(13)
    bars = [
        (f"{model}  {name}", entry.ratio_to_bf16, f"{entry.milliseconds:.0f} ms")
        for model, measured in report.models.items()
        for name, entry in measured.items()
    ]
    left = int(max(font.getlength(title) for title, _, _ in bars)) + 2 * _MARGIN
    longest = max(1.0, *(ratio for _, ratio, _ in bars))
    unit = _BAR / longest
    height = _ROW * (len(bars) + 2) + 2 * _MARGIN
    sheet = Image.new("RGB", (left + _BAR + 150, height), "white")
    pen = ImageDraw.Draw(sheet)
    here = report.machine
    head = f"time of a forward call, bf16 = 1; {here.cpu}, threads {here.threads}, {here.date}"
    pen.text((_MARGIN, _MARGIN), head, fill="black", font=font)
    line = left + unit
    pen.line((line, _MARGIN + _ROW, line, height - _MARGIN), fill="black")
    for index, (title, ratio, time) in enumerate(bars):
        top = _MARGIN + _ROW * (index + 1) + 6
        colour = _PLAIN if ratio == 1 else _FASTER if ratio < 1 else _SLOWER
        pen.text((_MARGIN, top), title, fill="black", font=font)
        pen.rectangle((left, top, left + ratio * unit, top + _ROW - 7), fill=colour)
        end = left + ratio * unit + 6
        text = f"{ratio:.2f}  {time}"
        pen.text((end, top), text, fill="black", font=font, stroke_width=2, stroke_fill="white")
    sheet.save(file)
