"""The page: one file with tables, curves and the images that differ most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from dq.eval.curve import curve
from dq.eval.grid import grid
from dq.eval.report import Page
from dq.eval.score import Scores
from dq.pipelines.gallery import Gallery
from dq.scoring.report import FULL, Report, number

__all__ = ["write_page"]


def write_page(report: Report, full: Gallery, galleries: Sequence[Gallery]) -> None:
    """Write `report.html`.

    Args:
        report: What was found.
        full: Images of full precision.
        galleries: Those of the candidates, in the order of the report.
    """
    page = Page("dq eval")
    page.table(report.rows())
    if report.reference_rows():
        page.heading("Distances to the reference set")
        page.table(report.reference_rows())
    page.text(", ".join(f"{k}: {v}" for k, v in report.facts.items()))
    panels = _panels(report)
    if len(report.candidates) > 1 and panels:
        page.heading("Bits against quality")
        page.image(curve(panels), "scores of all candidates by bits a weight")
    for each, gallery in zip(report.candidates, galleries, strict=True):
        worst = each.scores.worst() or list(range(min(8, len(gallery.files))))
        page.heading(f"{each.name}: the {len(worst)} that differ most")
        pairs = [(_open(full.files[i]), _open(gallery.files[i])) for i in worst]
        rows = {
            FULL: [a for a, _ in pairs],
            each.name: [b for _, b in pairs],
            "difference x 4": [_difference(a, b) for a, b in pairs],
        }
        page.image(grid(rows, [gallery.settings.prompts[i] for i in worst]), "the worst images")
        paths = ", ".join(f"{n} layers {path}" for path, n in each.compute_paths.items())
        page.text(f"computes as {paths or 'float'}")
        lines = [_line(each.scores, gallery.settings.prompts, i) for i in range(len(gallery.files))]
        page.table([lines[i] for i in worst])
        page.table(lines, folded=f"all {len(lines)} images")
    page.write(report.folder / "report.html")


def _panels(report: Report) -> dict[str, list[tuple[str, float, float]]]:
    """Return the points of up to three metrics."""
    names = [name for name in ("psnr", "clip", "fid") if name in report.metrics]
    return {
        name: [(c.name, c.average_weight_bits, c.scores.metrics[name]) for c in report.candidates]
        for name in names
    }


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _difference(one: Image.Image, two: Image.Image) -> Image.Image:
    return ImageChops.difference(one, two).point(lambda value: min(255, 4 * value))


def _line(scores: Scores, prompts: Sequence[str], index: int) -> dict[str, object]:
    values = {name: number(numbers[index]) for name, numbers in scores.images.items()}
    return {"image": index, "prompt": prompts[index], **values}
