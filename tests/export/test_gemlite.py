"""GemLite's layout, read as its kernels read it: word by word, with zeros and scales."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dq.export.exporter import exporters
from dq.nn import PackedLayer
from dq.nn.packed import packed
from dq.plan import LayerSpec
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec

GEMLITE = exporters["gemlite"]


def pack(spec: TensorSpec, columns: int = 96, dtype: torch.dtype = torch.bfloat16) -> PackedLayer:
    torch.manual_seed(0)
    layer = nn.Linear(columns, 40, dtype=dtype)
    made = packed(layer, LayerSpec(spec))
    made.load_layer(layer)
    return made


def read(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """Restore the weight `(N, K)` as the kernels see it."""
    meta = tensors["metadata"].tolist()
    bits, group, mask, each = meta[1:5]
    rows, columns = tensors["orig_shape"].tolist()
    words = tensors["W_q"].numpy().view(np.uint32)
    assert words.shape == (columns // each, rows)
    k = np.arange(columns)
    codes = (words[k // each] >> (bits * (k % each))[:, None].astype(np.uint32)) & np.uint32(mask)
    scales, zeros = (tensors[n].float().numpy()[k // group] for n in ("scales", "zeros"))
    return ((codes.astype(np.float32) - zeros) * scales).T


SPECS = {
    name: weight_preset(name)
    for name in ("binary", "binary-g32", "ternary", "ternary-g32", "int4-g32", "int2", "int8")
} | {"binary, float groups": TensorSpec("binary", Granularity("group", 16))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=[*SPECS])
def test_kernels_see_the_weight(spec: TensorSpec, dtype: torch.dtype) -> None:
    layer = pack(spec, dtype=dtype)
    assert GEMLITE.refuses(layer) is None
    tensors = {n.removeprefix("a."): t for n, t in GEMLITE.tensors("a", layer).items()}
    assert set(tensors) == {"W_q", "scales", "zeros", "metadata", "orig_shape", "meta_scale"}
    assert {tensors[n].dtype for n in ("W_q", "metadata", "orig_shape")} == {torch.int32}
    assert tensors["scales"].dtype == tensors["zeros"].dtype == dtype
    assert all(t.is_contiguous() for t in tensors.values())
    expected = layer.float_weight().numpy()
    error = 2.0 ** -{torch.bfloat16: 8, torch.float16: 10, torch.float32: 22}[dtype]
    np.testing.assert_allclose(read(tensors), expected, rtol=error, atol=1e-7)


def test_a_sign_is_a_bit() -> None:
    tensors = GEMLITE.tensors("a", pack(weight_preset("binary")))
    assert tensors["a.W_q"].numel() * 32 == 40 * 96
    assert tensors["a.zeros"].unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("spec", "columns", "words"),
    [
        (weight_preset("int3"), 96, "1, 2, 4 and 8 bits, not 3"),
        (weight_preset("binary"), 40, "no multiple of 32"),
        (weight_preset("binary-g8"), 96, "groups of 16 or more, not 8"),
        (weight_preset("binary-x2"), 96, "the layout has no binary channel of 2 bases"),
        (weight_preset("e4m3"), 96, "the layout has no fp8"),
    ],
)
def test_what_does_not_fit_is_said(spec: TensorSpec, columns: int, words: str) -> None:
    refused = GEMLITE.refuses(pack(spec, columns))
    assert refused is not None
    assert words in refused


def test_offsets_do_not_fit() -> None:
    spec = dataclasses.replace(weight_preset("binary"), symmetric=False)
    assert "the layout has no binary channel" in str(GEMLITE.refuses(pack(spec)))
