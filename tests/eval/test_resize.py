import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from dq.errors import DQError
from dq.eval.resize import RULES, resize


def noise(height: int = 40, width: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("edge", [13, 32, 90])
def test_clean_equals_pil_channel_by_channel(edge: int) -> None:
    images = noise()
    planes = [
        Image.fromarray(plane.float().numpy(), mode="F").resize(
            (edge, edge), Image.Resampling.BICUBIC
        )
        for plane in images[0]
    ]
    expected = torch.from_numpy(np.stack([np.asarray(p) for p in planes])).clamp(0, 255)
    assert torch.allclose(resize(images, edge, "clean")[0], expected, atol=2e-3)


def test_adm_reads_from_i_times_the_ratio() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    made = resize(row, 8, "adm")
    assert made[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    same = noise(24, 24)
    assert torch.equal(resize(same, 24, rule), same.float())
    flat = torch.full((2, 3, 10, 14), 77, dtype=torch.uint8)
    assert torch.allclose(resize(flat, 31, rule), torch.tensor(77.0))
    made = resize(noise(), 99, rule)
    assert made.shape == (1, 3, 99, 99)
    assert 0 <= float(made.min()) <= float(made.max()) <= 255


def test_the_rules_differ() -> None:
    made = [resize(noise(), 20, rule) for rule in RULES]
    assert all((a - b).abs().mean() > 1 for a, b in itertools.pairwise(made))
    with pytest.raises(DQError, match="clean"):
        resize(noise(), 20, "cleen")
