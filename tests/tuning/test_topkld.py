"""TopKLD is what its docstring says, and plain KL where it says so."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dq.errors import DQError
from dq.tuning.topkld import topkld

SIZE = 9


def logits(seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, 3, 4, SIZE, generator=generator)
    return teacher, student.requires_grad_()


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """torch's own, a mean over tokens."""
    p, q = (F.log_softmax(x.float().flatten(0, -2), dim=-1) for x in (teacher, student))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, student)
    return found


seeds = st.integers(0, 10_000)
sizes = st.integers(1, SIZE)
weights = st.floats(0, 5)


@given(seeds, sizes, st.floats(0.01, 20))
def test_equal_weights_make_plain_kl_for_every_k(seed: int, k: int, scale: float) -> None:
    teacher, student = logits(seed, scale)
    loss, expected = topkld(teacher, student, k), kl(teacher, student)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found, wanted = gradient(loss, student), gradient(expected, student)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@given(seeds, sizes, weights, weights, st.booleans())
def test_equal_logits_have_no_loss_and_nothing_to_learn(
    seed: int, k: int, inner: float, outer: float, reverse: bool
) -> None:
    teacher, _ = logits(seed)
    student = teacher.clone().requires_grad_()
    loss = topkld(teacher, student, k, inner, outer, reverse)
    assert loss == 0
    assert gradient(loss, student).abs().max() < 1e-6


@given(seeds, sizes, weights, weights, st.booleans())
def test_it_is_never_negative(seed: int, k: int, inner: float, outer: float, reverse: bool) -> None:
    assert topkld(*logits(seed), k, inner, outer, reverse) > -1e-6


@given(seeds, sizes)
def test_a_shift_of_all_logits_means_nothing(seed: int, k: int) -> None:
    teacher, student = logits(seed)
    moved = topkld(teacher + 3, student - 5, k, 2.0, 0.5, reverse=True)
    torch.testing.assert_close(moved, topkld(teacher, student, k, 2.0, 0.5, True))


# p = (1/2, 1/4, 1/8, 1/8) and q = (1/8, 1/8, 1/4, 1/2), S the first two: P = 3/4, Q = 1/4.
P = torch.tensor([0.5, 0.25, 0.125, 0.125])
Q = torch.tensor([0.125, 0.125, 0.25, 0.5])
BINARY = 0.75 * math.log(3) - 0.25 * math.log(3)
FORWARD = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)  # (2/3, 1/3) from (1/2, 1/2)
REVERSE = 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
REST = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)  # (1/2, 1/2) from (1/3, 2/3)


@pytest.mark.parametrize(
    ("inner", "outer", "reverse", "expected"),
    [
        (0.0, 0.0, False, BINARY),
        (2.0, 1.0, False, BINARY + 1.5 * FORWARD + 0.25 * REST),
        (1.0, 3.0, False, BINARY + 0.75 * FORWARD + 0.75 * REST),
        (1.0, 1.0, True, BINARY + 0.75 * REVERSE + 0.25 * REST),
        (2.0, 0.0, True, BINARY + 1.5 * REVERSE),
    ],
)
def test_numbers_worked_out_by_hand(
    inner: float, outer: float, reverse: bool, expected: float
) -> None:
    order = [2, 0, 3, 1]  # likely tokens may be anywhere
    teacher, student = P[order].log(), Q[order].log()
    loss = topkld(teacher, student, 2, inner, outer, reverse)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_tokens_of_the_whole_vocabulary_leave_nothing_to_the_last_term() -> None:
    teacher, student = logits(0)
    loss = topkld(teacher, student, SIZE, inner=2.0, outer=100.0)
    torch.testing.assert_close(loss, 2 * kl(teacher, student))
    backward = topkld(teacher, student, SIZE, reverse=True)
    torch.testing.assert_close(backward, kl(student.detach(), teacher))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("k", [1, 2, SIZE - 1, SIZE])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_extreme_logits_stay_finite(scale: float, k: int, reverse: bool) -> None:
    one, other = torch.zeros(SIZE), torch.zeros(SIZE)
    one[0], other[-1] = scale, scale  # P -> 1 and Q -> 0
    for teacher, student in ((one, other), (other, one), (-one, -other), (one, one)):
        student = student.clone().requires_grad_()
        loss = topkld(teacher, student, k, 2.0, 0.5, reverse)
        assert loss.isfinite()
        assert gradient(loss, student).isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    teacher, student = (x.detach().bfloat16() for x in logits(1))
    loss = topkld(teacher, student, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl(teacher, student))


@pytest.mark.parametrize("k", [-1, 0, SIZE + 1])
def test_k_is_checked(k: int) -> None:
    with pytest.raises(DQError, match=f"k is 1 to 9, the size of the vocabulary, not {k}"):
        topkld(*logits(0), k)


def test_shapes_and_weights_are_checked() -> None:
    teacher, student = logits(0)
    with pytest.raises(DQError, match=r"teacher \(3, 4, 9\) and student \(3, 4, 8\) must have one"):
        topkld(teacher, student[..., 1:], 2)
    with pytest.raises(DQError, match=r"inner and outer are 0 or more, not -1\.0 and 1\.0"):
        topkld(teacher, student, 2, inner=-1.0)
