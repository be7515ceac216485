import numpy as np

from dq.eval.curve import curve

POINTS = [("w8a8", 8.1, 38.0), ("w4a8", 4.5, 28.0), ("w3a8", 3.4, 22.0)]


def test_a_panel_a_metric() -> None:
    one, two = curve({"psnr": POINTS}), curve({"psnr": POINTS, "fid": POINTS})
    assert two.width == 2 * one.width
    assert two.height == one.height


def test_better_is_higher_and_more_bits_are_further_right() -> None:
    pixels = np.asarray(curve({"psnr": POINTS})).astype(int)
    green = (pixels[..., 1] - pixels[..., 0] > 50) & (pixels[..., 2] > 80)
    rows, columns = np.nonzero(green)
    left, right = columns < 120, columns > 220
    assert rows[right].mean() < rows[left].mean()


def test_a_single_point_and_equal_values() -> None:
    assert curve({"psnr": POINTS[:1]}).width > 0
    assert curve({"psnr": [("a", 4.0, 1.0), ("b", 4.0, 1.0)]}).width > 0
