"""Grids show each image in its place."""

import numpy as np
from PIL import Image

from dq.eval.grid import grid


def test_cells_hold_their_images_enlarged_without_smoothing() -> None:
    colours = [["red", "lime"], ["blue", "black"]]
    rows = {
        name: [Image.new("RGB", (8, 8), colour) for colour in row]
        for name, row in zip(("full precision", "w4a8"), colours, strict=True)
    }
    sheet = grid(rows, ["an apple", "a rather long prompt that needs several lines"], cell=32)
    pixels = np.array(sheet).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert (pixels == colour).all(1).sum() == 32 * 32
    where = {c: np.argwhere((np.array(sheet) == c).all(2)).mean(0) for c in
             ((255, 0, 0), (0, 255, 0), (0, 0, 255))}  # fmt: skip
    red, green, blue = where.values()
    assert red[0] == green[0] < blue[0]
    assert red[1] == blue[1] < green[1]
