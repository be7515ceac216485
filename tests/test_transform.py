import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dq.errors import DQError
from dq.transform import NO_TRANSFORM, Transform, TransformSpec, hadamard
from tests.transforms import KINDS, transform

seeds = st.integers(0, 999)
kinds = st.sampled_from(KINDS)


@pytest.mark.parametrize("size", [2**power for power in range(9)])
def test_hadamard_is_orthonormal_and_symmetric(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-5)
    np.testing.assert_allclose(matrix, scipy.linalg.hadamard(size) / size**0.5, rtol=1e-6)


def test_hadamard_spreads_an_outlier_over_its_block() -> None:
    x = torch.zeros(1, 16)
    x[0, 5] = 8.0
    y = Transform(rotation=4).input(x, -1)
    assert torch.equal(y[0, 4:8].abs(), torch.full((4,), 4.0))
    assert not y[0, :4].any()
    assert not y[0, 8:].any()


def literal(changed: Transform, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return z, s and H of all channels, float64."""
    shift = np.zeros(channels) if changed.shift is None else changed.shift.double().numpy()
    scale = np.ones(channels) if changed.scale is None else changed.scale.double().numpy()
    size = changed.rotation
    blocks = [scipy.linalg.hadamard(size) / size**0.5] * (channels // size) if size else []
    return shift, scale, scipy.linalg.block_diag(*blocks) if size else np.eye(channels)


@given(kinds, seeds, st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]))
def test_inputs_are_what_the_formula_says(
    kind: TransformSpec, seed: int, blocks: int, dtype: torch.dtype
) -> None:
    channels = 8 * blocks
    changed = transform(kind, channels, seed)
    x = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    shift, scale, matrix = literal(changed, channels)
    expected = (x.double().numpy() - shift) / scale @ matrix
    y = changed.input(x, -1)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    image = x.movedim(-1, 1).unsqueeze(-1)  # channels second
    np.testing.assert_allclose(
        changed.input(image, 1).squeeze(-1).movedim(1, -1), expected, rtol=1e-4, atol=1e-5
    )


@given(
    kinds,
    seeds,
    st.sampled_from([(6, 16), (6, 8, 1, 1), (4, 8, 3, 3), (8, 16, 2, 3)]),
    st.sampled_from([1, 2]),
)
def test_weights_are_what_the_formula_says_and_are_restored(
    kind: TransformSpec, seed: int, shape: tuple[int, ...], groups: int
) -> None:
    width = shape[1]
    changed = transform(kind, width * groups, seed)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    shift, scale, matrix = literal(changed, width * groups)
    expected = np.empty(shape)
    offset = np.zeros(shape[0])
    for row in range(shape[0]):
        group = row * groups // shape[0]
        mine = slice(group * width, (group + 1) * width)
        # One vector of the group's channels for each position of the kernel.
        vectors = weight[row].double().numpy().reshape(width, -1)
        found = (vectors.T * scale[mine]) @ matrix[mine, mine]
        expected[row] = found.T.reshape(shape[1:])
        offset[row] = (vectors.sum(1) * shift[mine]).sum()
    made = changed.weight(weight, groups)
    assert made.shape == weight.shape
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed.restored(made, groups), weight, rtol=1e-4, atol=1e-5)
    found_offset = changed.offset(weight, groups)
    if changed.shift is None:
        assert found_offset is None
    else:
        assert found_offset is not None
        np.testing.assert_allclose(found_offset, offset, rtol=1e-3, atol=1e-4)


@given(kinds, seeds)
def test_products_do_not_change(kind: TransformSpec, seed: int) -> None:
    changed = transform(kind, 16, seed)
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(5, 16, generator=generator), torch.randn(3, 16, generator=generator)
    y = changed.input(x, -1) @ changed.weight(weight).T
    offset = changed.offset(weight)
    y = y if offset is None else y + offset
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_keep_their_dtype_and_weights_are_float32(dtype: torch.dtype) -> None:
    for kind in KINDS:
        changed = transform(kind, 16, 0)
        x = torch.randn(4, 16).to(dtype)
        assert changed.input(x, -1).dtype == dtype
        assert changed.weight(x).dtype == changed.restored(x).dtype == torch.float32
        offset = changed.offset(x)
        assert offset is None or offset.dtype == torch.float32


def test_nothing_is_left_as_it_is() -> None:
    x, weight = torch.randn(3, 5), torch.randn(2, 5)
    assert NO_TRANSFORM.spec is None
    assert torch.equal(NO_TRANSFORM.input(x, -1), x)
    assert torch.equal(NO_TRANSFORM.weight(weight), weight)
    assert NO_TRANSFORM.offset(weight) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_transforms_know_their_spec(kind: TransformSpec) -> None:
    assert transform(kind, 16, 0).spec == kind
    assert kind.bytes(10) == 40 * (kind.shift + kind.scale)
    assert TransformSpec(**dataclasses.asdict(kind)) == kind


def test_the_written_form_names_the_parts() -> None:
    assert str(TransformSpec(True, True, 64)) == "shifted, scaled, rotated by 64"
    assert str(TransformSpec(scale=True)) == "scaled"
    assert str(TransformSpec(rotation=8)) == "rotated by 8"


@pytest.mark.parametrize("size", [1, 3, 6, 12, 100, -1, -2, -8])
def test_rotations_have_powers_of_two(size: int) -> None:
    with pytest.raises(DQError, match=f"blocks of 2, 4, 8, ... channels, not {size}"):
        TransformSpec(rotation=size)


def test_a_transform_does_something() -> None:
    with pytest.raises(DQError, match="a transform without shift, scale and rotation does nothing"):
        TransformSpec()


@pytest.mark.parametrize(
    ("shape", "groups", "size", "width"),
    [((4, 12), 1, 8, 12), ((4, 12), 1, 16, 12), ((4, 8, 3, 3), 2, 16, 8), ((4, 3, 1, 1), 1, 2, 3)],
)
def test_rotations_that_do_not_fit_are_refused(
    shape: tuple[int, ...], groups: int, size: int, width: int
) -> None:
    changed = Transform(rotation=size)
    for act in (changed.weight, changed.restored):
        with pytest.raises(DQError, match=f"rotations by {size} do not fit {width} channels"):
            act(torch.zeros(shape), groups)


def test_an_input_is_left_alone() -> None:
    x: Tensor = torch.randn(3, 16)
    before = x.clone()
    for kind in KINDS:
        transform(kind, 16, 0).input(x, -1)
        transform(kind, 16, 0).weight(x)
    assert torch.equal(x, before)
