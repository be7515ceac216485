"""The demonstration, end to end, on the checkpoint that ships with the package."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dq.demo import Settings, run


@pytest.mark.parametrize(("model", "recipe"), [("emoji-unet", "w4a8"), ("emoji-dit", "w4a8")])
def test_demo_leaves_a_report_a_grid_and_a_model(model: str, recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    output.mkdir()
    for name in ("old", "report.html"):
        (output / name).write_text("from an earlier run")
    result = run(model, recipe, output, Settings(images=3, steps=4))
    assert {p.name for p in output.iterdir()} == {"grid.png", "report.html", "model"}
    assert result.images == 3
    # Few steps and images, but really trained weights: 4 bits keep the picture.
    assert result.psnr > 20
    assert result.worst_psnr <= result.psnr
    assert 4 < result.average_weight_bits < 6
    assert result.bytes_on_disk < 0.5 * result.float_bytes
    assert sum(result.compute_paths.values()) > 50
    assert json.loads(json.dumps(result.to_dict()))["model"] == model
    picture = Image.open(output / "grid.png")
    assert picture.width > 3 * 128
    page = (output / "report.html").read_text()
    assert f"{result.psnr:.1f} dB" in page
    assert "data:image/png;base64," in page
    assert f"{result.average_weight_bits:.2f}" in str(result)
