"""The page: which layers are fragile, what each budget buys, and whether predictions hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dq.budgets.plots import bit_map, fronts, layers
from dq.budgets.report import Report
from dq.eval.report import Page
from dq.sensitivity.table import decibels

__all__ = ["write_page"]


def write_page(
    report: Report, folder: Path, model: str, bits: Mapping[str, int], keys: Sequence[str]
) -> None:
    """Write `report.html`.

    Args:
        report: What was found.
        folder: Where to write.
        model: What for, in words.
        bits: Width of each weight format.
        keys: What to draw, as "w:FORMAT" and "a:FORMAT".
    """
    page = Page(f"dq sensitivity: {model}")
    for line in report.words():
        page.text(line)
    page.heading("Layer by layer")
    page.text(
        "Each bar is one layer with one tensor quantized and everything else in full precision; "
        "long bars are fragile. Layers stand in the order in which they run."
    )
    rows = report.table.rows
    for key in keys:
        kind = "weight" if key[0] == "w" else "input"
        page.image(layers(report.table, kind, key[2:]), f"{kind} {key[2:]} by layer")
    page.heading("The 20 most fragile layers")
    page.text("Signal to noise of the output in dB, with that tensor alone in that format.")
    page.table(report.fragile())
    page.heading("What a budget buys")
    if report.front:
        page.image(bit_map(report.table, report.front, dict(bits)), "bits by layer and budget")
        lines = {"mixed": report.front, "the same everywhere": report.uniform}
        page.image(fronts({k: v for k, v in lines.items() if v}), "size against signal to noise")
        page.table(report.sizes())
    if report.random:
        page.heading("Do predictions hold?")
        page.table([
            {
                "random choice": point.name, "bits": f"{point.bits:.2f}",
                "predicted dB": f"{decibels(point.predicted):.1f}",
                "real dB": f"{decibels(point.real):.1f}",
            }
            for point in report.random
        ])  # fmt: skip
    page.heading("All layers")
    page.table(report.fragile(len(rows)), folded=f"all {len(rows)} layers")
    page.write(folder / "report.html")
