import pytest
import torch

from dq.errors import DQError
from dq.eval.manifold import precision_recall


def test_against_pairs_counted_by_hand() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    # With one neighbour every ball reaches 1: 4.9 is covered, 5.1 is not.
    images = torch.tensor([[0.5], [4.9], [5.1], [100.0]])
    precision, recall = precision_recall(images, line, neighbours=1)
    assert precision == 0.5
    # Balls of the images: 0.5 reaches 4.4, 4.9 and 5.1 reach 0.2, 100 reaches 94.9.
    assert recall == 1.0


def test_equal_and_disjoint_sets() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)


def test_less_variety_costs_recall() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    y = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    precision, recall = precision_recall(x * 0.3, y)
    assert precision > 0.95
    assert recall < 0.6


def test_mistakes() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(DQError, match="more than 3 images"):
        precision_recall(x, x)
    with pytest.raises(DQError, match="of 4 and of 2 dimensions"):
        precision_recall(torch.zeros(5, 4), torch.zeros(5, 2))
