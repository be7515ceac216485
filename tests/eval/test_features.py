import pytest
import torch
from torch import nn

from dq.errors import DQError
from dq.eval.features import extractors, of_module


class Means(nn.Module):
    num_features = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def images(count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 20, 20), generator=generator, dtype=torch.uint8)


def test_any_module() -> None:
    extractor = of_module(Means(), edge=20)
    assert extractor.name == "Means"
    assert torch.allclose(extractor(images()), images().float().mean((2, 3)))
    batches = extractor.over(images(7).split(3))
    assert torch.equal(batches, extractor(images(7)))


def test_modules_must_say_what_they_give() -> None:
    with pytest.raises(DQError, match="no num_features"):
        of_module(nn.Flatten(), edge=8)
    with pytest.raises(DQError, match="resize rule 'none': choose clean"):
        of_module(Means(), edge=8, rule="none")
    wrong = Means()
    wrong.num_features = 4
    with pytest.raises(DQError, match=r"shape \(5, 3\) for 5 images; expected \(5, 4\)"):
        of_module(wrong, edge=20)(images())


def test_the_embedded_extractor() -> None:
    extractor = extractors["emoji-clip"](None, "clean", "cpu")
    found = extractor(images())
    assert (extractor.dimension, extractor.edge, extractor.licence) == (192, 64, "Apache-2.0")
    assert found.shape == (5, 192)
    assert torch.allclose(found[:2], extractor(images()[:2]), atol=1e-4)


def test_all_extractors_are_known() -> None:
    assert set(extractors.names()) == {"clip", "emoji-clip", "inception"}
    with pytest.raises(DQError, match="Did you mean 'inception'"):
        extractors["inceptoin"]
