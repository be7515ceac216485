"""A distance between two distributions over tokens that tells the likely tokens from the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.errors import DQError

__all__ = ["topkld"]


def topkld(
    teacher: Tensor,
    student: Tensor,
    k: int,
    inner: float = 1.0,
    outer: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Return how far a student's tokens are from its teacher's: an experimental loss.

    With p and q the probabilities of teacher and student, S the k tokens that the teacher finds
    most likely, R the others, P = sum_S p, Q = sum_S q, p_S = p / P on S, p_R = p / (1 - P) on R:

    L = KL(P || Q) + inner * P * D(p_S, q_S) + outer * (1 - P) * KL(p_R || q_R),

    where the first term is that of two outcomes, S or R. D is KL(p_S || q_S), or KL(q_S || p_S) if
    `reverse`. With inner = outer = 1 and forward D it is KL(p || q), exactly: the chain rule.

    The idea, to balance what the top tokens say and what the rest implies, is TopKLD of
    "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models" (arXiv 2501.06218).
    Its weights and directions could not be read and no code of it is public: the definition above
    is dq's own, not the paper's formula, and none of the paper's numbers is claimed for it.

    Everything is computed from logarithms in float32, so that a set of next to no probability, of
    either side, gives a finite loss and gradient.

    Args:
        teacher: Logits `(..., V)`, finite, of any floating dtype.
        student: Logits `(..., V)`; the gradient goes here.
        k: Size of S, 1 to V; that of the sampler's top-k, if it has one. With V nothing is left
            for the last term.
        inner: Weight within S, 0 or more.
        outer: Weight within R, 0 or more.
        reverse: Whether D looks from the student's side: it then shuns tokens that the teacher
            finds unlikely, instead of covering all that it finds likely.

    Returns:
        A float32 scalar in nats, the mean over tokens; 0 or more but for rounding.

    Raises:
        DQError: For shapes that differ, a k that is out of range, or a negative weight.
    """
    if teacher.shape != student.shape or not teacher.dim():
        raise DQError(
            f"logits of teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must "
            "have one shape, with the vocabulary last"
        )
    size = teacher.shape[-1]
    if not 1 <= k <= size:
        raise DQError(f"k is 1 to {size}, the size of the vocabulary, not {k}")
    if inner < 0 or outer < 0:
        raise DQError(f"inner and outer are 0 or more, not {inner} and {outer}")
    order = teacher.argsort(dim=-1, descending=True, stable=True)
    p, q = (F.log_softmax(x.float(), dim=-1).gather(-1, order) for x in (teacher, student))
    loss = _share(p[..., :k], q[..., :k], inner, reverse)
    if k < size:
        loss = loss + _share(p[..., k:], q[..., k:], outer, reverse=False)
    return loss.mean()


def _share(p: Tensor, q: Tensor, weight: float, reverse: bool) -> Tensor:
    """Return what one of the two sets adds for each token, from its log-probabilities `(..., n)`.

    That is P log(P / Q) + weight * P * D(p / P, q / Q), where P and Q are the sums of the set.
    """
    whole_p, whole_q = p.logsumexp(-1, keepdim=True), q.logsumexp(-1, keepdim=True)
    within = (q - whole_q, p - whole_p) if reverse else (p - whole_p, q - whole_q)
    chosen, ratio = whole_p.squeeze(-1).exp(), (whole_p - whole_q).squeeze(-1)
    return chosen * (ratio + weight * _divergence(*within))


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension, from log-probabilities."""
    return torch.sum(p.exp() * (p - q), dim=-1)
