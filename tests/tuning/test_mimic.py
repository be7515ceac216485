"""Features compared along the teacher's leading directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dq.tuning.mimic import Mimicry, leading


def features(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 24, 5, 4), (3, 40, 24)])
@pytest.mark.parametrize(("part", "kept"), [(1, 24), (4, 6), (5, 5), (48, 1)])
def test_the_basis_is_orthonormal_and_a_part_of_the_channels(
    shape: tuple[int, ...], part: int, kept: int
) -> None:
    basis = leading(features(shape), part)
    assert basis.shape == (24, kept)
    assert torch.allclose(basis.mT @ basis, torch.eye(kept), atol=1e-5)


def test_it_finds_the_directions_that_vary_most() -> None:
    rotation, _ = torch.linalg.qr(features((16, 16), 1))
    strength = torch.tensor([9.0, 7.0, 5.0, 3.0] + [0.1] * 12)
    x = (features((2, 500, 16)) * strength) @ rotation.mT + 4  # a shift of all is no direction
    basis = leading(x, 4)
    assert torch.allclose(basis @ basis.mT, rotation[:, :4] @ rotation[:, :4].mT, atol=1e-2)


def test_only_what_lies_in_them_counts() -> None:
    x = features((4, 8, 3, 3))
    loss = Mimicry({"a": x}, part=2)
    (basis,) = loss.bases.values()
    assert float(loss({"a": x}, {"a": x})) == 0
    outside = features((4, 3, 3, 8), 2)
    outside = (outside - outside @ basis @ basis.mT).movedim(-1, 1)
    assert float(loss({"a": x + outside}, {"a": x})) == pytest.approx(0, abs=1e-10)
    inside = (0.5 * basis[:, 0]).view(1, 8, 1, 1)
    assert float(loss({"a": x + inside}, {"a": x})) == pytest.approx(
        0.25 / basis.shape[1], rel=1e-4
    )


def test_it_is_the_mean_over_blocks_in_their_units_or_in_their_own() -> None:
    small, large = features((2, 10, 8)), 100 * features((2, 10, 8), 1)
    teacher = {"a": small, "b": large}
    student = {"a": small * 1.1, "b": large * 1.1}
    plain, normalized = Mimicry(teacher), Mimicry(teacher, normalized=True)
    each = [float(Mimicry({n: teacher[n]})({n: student[n]}, {n: teacher[n]})) for n in teacher]
    assert float(plain(student, teacher)) == pytest.approx(sum(each) / 2, rel=1e-5)
    assert each[1] > 1000 * each[0]
    shares = [
        float(Mimicry({n: teacher[n]}, normalized=True)({n: student[n]}, {n: teacher[n]}))
        for n in teacher
    ]
    assert 0.2 < shares[0] / shares[1] < 5
    assert float(normalized(student, teacher)) == pytest.approx(sum(shares) / 2, rel=1e-5)


def test_its_gradient_reaches_the_student_alone() -> None:
    x = features((2, 10, 8)).requires_grad_()
    loss = Mimicry({"a": x.detach()})
    loss({"a": x * 1.1}, {"a": x.detach()}).backward()
    assert x.grad is not None
    assert all(not basis.requires_grad for basis in loss.bases.values())
