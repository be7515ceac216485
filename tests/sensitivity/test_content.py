"""SSIM of images: what is drawn, and what is remembered."""

from __future__ import annotations

from pathlib import Path

import torch

from dq.calibrate import CalibrationSpec
from dq.sensitivity.content import with_content
from dq.sensitivity.survey import fill_table
from dq.sensitivity.table import CONTENT
from dq.work import Work
from tests.sensitivity.probes import network, outputs, probe
from tests.sources import Samples


class Images(Samples):
    """Enlarges what the denoiser says; counts what is drawn."""

    drawn = 0

    def images(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        self.drawn += 1
        pixels = torch.sigmoid(self.run(spec, batch)[:, :3])
        return torch.nn.functional.interpolate(pixels, scale_factor=4)


def test_each_layer_is_drawn_once_and_full_precision_only_if_one_is_missing(tmp_path: Path) -> None:
    model = network("dit64")
    one = probe(model, weights=("int2", "int4"))
    before = outputs(one)
    table = fill_table(one, 0.0, Work(None))
    source = Images(model, 1)

    def drawn() -> int:
        source.drawn = 0
        found.append(with_content(table, one, source, CalibrationSpec(), Work(tmp_path)))
        return source.drawn

    found = []
    layers = [row.name for row in table.rows if row.group == CONTENT]
    runs = [len(one.runs(name)) for name in layers]
    assert drawn() == 1 + sum(runs)
    assert drawn() == 0
    (tmp_path / "content-0001.safetensors").unlink()
    assert drawn() == 1 + runs[1]
    assert found[0] == found[1] == found[2]
    for row in found[0].rows:
        assert set(row.content) == (set(one.keys(row.name)) if row.name in layers else set())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(one), strict=True))
