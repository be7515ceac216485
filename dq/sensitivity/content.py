"""The paper's score of the content group: structural similarity of finished images.

Far dearer than noise on the denoiser's output, and over the layers of SDXL it ranks them as that
does (rank correlation 0.92 to 0.99); it is here to compare with (MixDQ, Zhao et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dq.calibrate import CalibrationSpec, Source
from dq.nn.swap import replace
from dq.progress import track
from dq.sensitivity.probe import Probe
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
    reference = source.images(spec, 0)
    rows = []
    for row in track(table.rows, "drawing with one layer quantized"):
        content: dict[str, float] = {}
        if row.group == CONTENT:
            stage = f"content-{row.name}"
            stored = work.load(stage)
            if stored is None:
                stored = _scores(row, probe, source, spec, reference)
                work.save(stage, stored)
            content = _filled(row, {key: float(value) for key, value in stored.items()})
        rows.append(dataclasses.replace(row, content=content))
    return dataclasses.replace(table, rows=tuple(rows))


def _scores(
    row: Row, probe: Probe, source: Source, spec: CalibrationSpec, reference: Tensor
) -> dict[str, Tensor]:
    scores = {}
    before = probe.layer(row.name)
    for key in probe.runs(row.name):
        replace(probe.model, row.name, probe.variant(row.name, key))
        try:
            images = source.images(spec, 0)
        finally:
            replace(probe.model, row.name, before)
        score = structural_similarity_index_measure(images, reference, data_range=1.0)
        assert isinstance(score, Tensor)  # a pair is returned only when asked for
        scores[key] = score.double().cpu()
    return scores


def _filled(row: Row, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of all formats."""
    filled = {}
    for kind, noise in (("w", row.weight), ("a", row.input)):
        known = [key[2:] for key in scores if key[0] == kind]
        for name, value in noise.items():
            near = min(known, key=lambda other: abs(noise[other] - value))
            lost = (1.0 - scores[f"{kind}:{near}"]) * (value / noise[near] if noise[near] else 1.0)
            filled[f"{kind}:{name}"] = 1.0 - min(lost, 1.0)
    return filled
