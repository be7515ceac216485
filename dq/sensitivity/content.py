"""The paper's score of the content group: structural similarity of finished images.

Far dearer than noise on the denoiser's output, and over the layers of SDXL it ranks them as that
does (rank correlation 0.92 to 0.99); it is here to compare with (MixDQ, Zhao et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dq.calibrate import CalibrationSpec, Source
from dq.nn.swap import exchanged
from dq.sensitivity.probe import Probe
from dq.sensitivity.shares import shared
from dq.sensitivity.table import CONTENT, Row, Table
from dq.work import Work

__all__ = ["with_content"]


@torch.no_grad()
def with_content(
    table: Table, probe: Probe, source: Source, spec: CalibrationSpec, work: Work
) -> Table:
    """Return the table with the SSIM of images for each format of each content layer.

    Images are drawn with one tensor of one layer quantized, in the formats that the probe runs; for
    the others, one minus SSIM follows the noise.

    Args:
        table: As measured.
        probe: What it was measured with.
        source: Draws the images.
        spec: Which; its first batch is taken.
        work: Where finished layers are kept.
    """
    layers = [row.name for row in table.rows if row.group == CONTENT]
    drawing = _Drawing(probe, source, spec)
    parts = shared(
        work,
        "content",
        len(layers),
        lambda index: drawing.scores(layers[index]),
        "drawing with one layer quantized",
    )
    scores = dict(zip(layers, parts, strict=True))
    rows = (
        dataclasses.replace(
            row, content=_filled(row, scores[row.name]) if row.name in scores else {}
        )
        for row in table.rows
    )
    return dataclasses.replace(table, rows=tuple(rows))


class _Drawing:
    """Draws the same images with one tensor of one layer quantized, and scores them."""

    def __init__(self, probe: Probe, source: Source, spec: CalibrationSpec) -> None:
        self.probe = probe
        self.source = source
        self.spec = spec

    @cached_property
    def reference(self) -> Tensor:
        """Images of full precision; not drawn where all scores are known."""
        return self.source.images(self.spec, 0)

    def scores(self, layer: str) -> dict[str, Tensor]:
        """Return the SSIM for each format of a layer that the probe runs."""
        return {key: self._score(layer, key) for key in self.probe.runs(layer)}

    def _score(self, layer: str, key: str) -> Tensor:
        reference = self.reference  # while all layers are float
        with exchanged(self.probe.model, {layer: self.probe.variant(layer, key)}):
            images = self.source.images(self.spec, 0)
        score = structural_similarity_index_measure(images, reference, data_range=1.0)
        assert isinstance(score, Tensor)  # a pair is returned only when asked for
        return score.double().cpu()


def _filled(row: Row, stored: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the scores of all formats."""
    scores = {key: float(value) for key, value in stored.items()}
    filled = {}
    for kind, noise in (("w", row.weight), ("a", row.input)):
        known = [key[2:] for key in scores if key[0] == kind]
        for name, value in noise.items():
            near = min(known, key=lambda other: abs(noise[other] - value))
            lost = (1.0 - scores[f"{kind}:{near}"]) * (value / noise[near] if noise[near] else 1.0)
            filled[f"{kind}:{name}"] = 1.0 - min(lost, 1.0)
    return filled
