"""Paired metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from dq.errors import DQError
from dq.eval.paired import paired_psnr


def flat(value: int, size: int = 4) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def test_psnr_of_a_constant_difference() -> None:
    result = paired_psnr([flat(100), flat(50)], [flat(110), flat(51)])
    assert result.values == pytest.approx([20 * math.log10(255 / 10), 20 * math.log10(255)])
    assert result.mean == pytest.approx(sum(result.values) / 2)
    assert result.worst == result.values[0]


def test_equal_images_count_as_100_db() -> None:
    assert paired_psnr([flat(7)], [flat(7)]).values == (100.0,)


def test_numbers_and_sizes_must_agree() -> None:
    with pytest.raises(DQError, match="1 images cannot be paired with 2"):
        paired_psnr([flat(0)], [flat(0), flat(0)])
    with pytest.raises(DQError, match=r"pair 0: sizes \(4, 4\) and \(8, 8\) differ"):
        paired_psnr([flat(0)], [flat(0, size=8)])
