"""All binarizers: their errors, gradients, and that what is stored is what was trained."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from dq.binarizers import Binarizer, binarizers
from dq.binarizers.estimators import estimators
from dq.binarizers.residual import EBB, LMB, Residual
from dq.binarizers.ternary import Ternary
from dq.binarizers.xnor import XNOR
from dq.errors import DQError
from dq.quantize import dequantize
from dq.storage import pack_weight, stored_shapes, unpack_weight

ROWS, COLUMNS = 24, 96
names = pytest.mark.parametrize("name", binarizers.names())
groups = pytest.mark.parametrize("group", [0, 32])


def weight(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)


def sample(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(512, 1152, generator=generator)
    uniform = torch.rand(512, 1152, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def trained(name: str, group: int = 0, seed: int = 0) -> tuple[Binarizer, Tensor]:
    """A binarizer that has learned a little, some scales negative, at the end of its training."""
    matrix = weight(seed).requires_grad_()
    made = binarizers[name](matrix, group)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter[0] *= -1
    made.at(1.0)
    return made, matrix


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize(
    ("make", "normal", "laplace"),
    [
        (lambda w: XNOR(w), 0.363, 0.499),
        (lambda w: Residual(w, bases=2), 0.130, 0.228),
        (lambda w: Residual(w, bases=3), 0.058, 0.141),
        (lambda w: Residual(w, refit=True), 0.118, 0.174),
        (lambda w: LMB(w), 0.130, 0.228),
        (lambda w: EBB(w), 0.130, 0.228),
        (lambda w: Ternary(w, rule="twn"), 0.191, 0.281),
        (lambda w: Ternary(w, rule="tbt"), 0.199, 0.314),
        (lambda w: Ternary(w, rule="b158"), 0.263, 0.393),
        (lambda w: binarizers["fdb"](w), 0.149, 0.207),
    ],
    ids=["xnor", "residual2", "residual3", "refit", "lmb", "ebb", "twn", "tbt", "b158", "fdb"],
)
def test_errors_before_training_are_those_of_the_literature(
    make, normal: float, laplace: float, kind: str
) -> None:
    w = sample(kind)
    with torch.no_grad():
        error = (make(w)(w) - w).square().sum() / w.square().sum()
    assert float(error) == pytest.approx({"normal": normal, "laplace": laplace}[kind], rel=0.02)


@names
@groups
def test_what_is_stored_is_what_was_trained(name: str, group: int) -> None:
    made, matrix = trained(name, group)
    found = made.export(matrix)
    with torch.no_grad():
        assert torch.allclose(found.value, made(matrix), rtol=1e-5, atol=1e-8)
    state = pack_weight(found.codes, found.scales, found.spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == stored_shapes(
        found.spec, ROWS, COLUMNS
    )
    assert torch.equal(unpack_weight(state, found.spec, COLUMNS), found.value)
    assert 8 * sum(t.numel() * t.element_size() for t in state.values()) == found.bits


@names
@groups
def test_every_weight_and_scale_has_a_gradient(name: str, group: int) -> None:
    made, matrix = trained(name, group)
    for progress in (0.0, 0.6):
        made.at(progress)
        matrix.grad = None
        made(matrix).square().sum().backward()
        assert matrix.grad is not None
        assert (matrix.grad != 0).float().mean() > 0.5
    assert all(parameter.grad is not None for parameter in made.parameters())


@names
def test_learned_scales_survive_a_file(name: str) -> None:
    made, matrix = trained(name)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    again = binarizers[name](weight(5), 0)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.at(1.0)
    assert torch.equal(again(matrix), made(matrix))


@names
def test_a_group_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(DQError, match="group size 36 does not divide 96"):
        binarizers[name](weight(), 36)


@pytest.mark.parametrize("kind", [EBB, LMB])
def test_gradients_of_two_bases_are_the_published_ones(kind: type[Residual]) -> None:
    w = weight().requires_grad_()
    with torch.no_grad():
        w[0] *= 100  # beyond the window
    made = kind(w)
    made(w).backward(gradient := torch.randn(w.shape))
    s1, s2 = (s.detach().view(-1, 1) for s in made.scales)
    sign = torch.where(w < 0, -1.0, 1.0)
    left = (w - s1 * sign).detach()
    outer, inner = (x.abs() <= 1 for x in (w, left))
    expected = gradient * (s1 * outer + s2 * inner * (1 - s1 * outer))
    assert torch.allclose(w.grad, expected, rtol=1e-5, atol=1e-8)
    last = torch.where(left < 0, -1.0, 1.0)
    assert torch.allclose(made.scales[1].grad.flatten(), (gradient * last).sum(1), rtol=1e-4)
    first = gradient * sign * (1 - s2 * inner)
    assert torch.allclose(made.scales[0].grad.flatten(), first.sum(1), rtol=1e-4, atol=1e-5)


def test_ebb_whose_second_scale_is_zero_is_xnor_to_the_bit() -> None:
    w = weight()
    w[0, 0] = 0
    evolved, plain = EBB(w), XNOR(w)
    with torch.no_grad():
        evolved.scales[1].zero_()
        assert torch.equal(evolved(w), plain(w))
        for each in (evolved, plain):
            each.at(1.0)
        evolved.scales[1].fill_(3.0)  # counts no more
        assert torch.equal(evolved(w), plain(w))
    assert torch.equal(evolved.export(w).value, plain.export(w).value)


def test_a_fading_basis_leaves_without_a_jump() -> None:
    made, plain = EBB(weight(), fading=True), EBB(weight())
    torch.testing.assert_close(made(weight()), plain(weight()))
    made.at(0.25)
    one, two = XNOR(weight())(weight()), plain(weight())
    torch.testing.assert_close(made(weight()), (one + two) / 2)
    made.at(0.4999)
    before = made(weight())
    made.at(0.5)
    torch.testing.assert_close(made(weight()), before, rtol=0, atol=1e-3)


def test_the_penalty_of_ebb_ends_with_its_second_basis() -> None:
    made = EBB(weight())
    with torch.no_grad():
        made.scales[1].neg_()
    assert float(made.regularizer().detach()) > 0  # a magnitude: negative scales are not rewarded
    made.at(0.5)
    assert float(made.regularizer().detach()) == 0
    assert made.used == 1
    assert EBB(weight(), switch=0.7).used == 2


@pytest.mark.parametrize("name", estimators.names())
@pytest.mark.parametrize("unit", [1e-3, 1.0, 50.0])
def test_estimators_end_in_signs_whatever_the_unit(name: str, unit: float) -> None:
    w = weight() * unit
    made = XNOR(w, estimator=name)
    made.at(1.0)
    with torch.no_grad():
        value = made(w) / made.scale.view(-1, 1)
    assert set(value.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(made.export(w).value, made(w).detach())
    gradients = []
    for progress in (0.0, 0.3, 1.0):
        made.at(progress)
        leaf = w.clone().requires_grad_()
        made(leaf).sum().backward()
        assert bool(leaf.grad.isfinite().all())
        gradients.append(leaf.grad)
    small = XNOR(w / unit, estimator=name)
    leaf = (w / unit).clone().requires_grad_()
    small(leaf).sum().backward()
    assert torch.allclose(leaf.grad * unit, gradients[0], rtol=1e-2, atol=1e-4 * unit)


def test_reste_sharpens_between_its_ends() -> None:
    x = torch.tensor([0.05, 0.5, 1.2, 1.6]).requires_grad_()
    slopes = []
    for progress in (0.0, 1.0):
        x.grad = None
        estimators["reste"](x, progress).sum().backward()
        slopes.append(x.grad.tolist())
    assert slopes[0] == pytest.approx([1, 1, 1, 0])
    expected = [0.1 ** (1 / 3) / 0.1, 0.5 ** (-2 / 3) / 3, 1.2 ** (-2 / 3) / 3, 0]
    assert slopes[1] == pytest.approx(expected)


def test_a_centred_row_has_its_mean_stored() -> None:
    w = weight() + 0.05
    plain, centred = XNOR(w), XNOR(w, centred=True)
    errors = [float((each(w) - w).detach().square().sum()) for each in (plain, centred)]
    assert errors[1] < 0.8 * errors[0]
    found = centred.export(w)
    assert torch.allclose(found.value, centred(w).detach(), atol=1e-7)
    assert not found.spec.symmetric
    assert torch.equal(dequantize(found.codes, found.scales, found.spec), found.value)


def test_an_unknown_rule_names_those_that_there_are() -> None:
    with pytest.raises(DQError, match="twn"):
        Ternary(weight(), rule="twm")
