"""The error of each format, against a table that was made by other code on the same tensors."""

import functools

import pytest
import torch
from torch.nn import functional as F

from dq.distance import sqnr
from dq.quantize import choose_scales, fake_quantize
from dq.spec import Granularity, TensorSpec

TENSOR, ROW = Granularity("tensor"), Granularity("channel")


def grouped(format: str, size: int, scales: str = "float32", rule: str = "search") -> TensorSpec:
    return TensorSpec(format, Granularity("group", size), scale_format=scales, scale_rule=rule)


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """256 x 4096; drawn in this order, since they share the generator."""
    torch.manual_seed(0)
    shape = 256, 4096
    gauss = torch.randn(shape)
    student = torch.distributions.StudentT(5.0).sample(shape)
    outliers = torch.randn(shape) * torch.where(torch.rand(shape[1]) < 0.01, 20.0, 1.0)
    gelu = F.gelu(torch.randn(shape) * 1.5)
    silu = F.silu(torch.randn(shape) * 2)
    return {"gauss": gauss, "student": student, "outliers": outliers, "gelu": gelu, "silu": silu}


ROWS = [  # dB for the five tensors, in their order
    (TensorSpec("int8", TENSOR), (39.3, 27.5, 22.5, 35.6, 35.6)),
    (TensorSpec("int8", ROW), (41.2, 34.0, 26.3, 38.4, 38.2)),
    (TensorSpec("e4m3", TENSOR), (31.6, 31.5, 31.6, 31.6, 31.6)),
    (TensorSpec("e5m2", TENSOR), (25.6, 25.6, 25.5, 25.6, 25.6)),
    (TensorSpec("e3m4", TENSOR), (37.6, 37.6, 37.3, 37.5, 37.6)),
    (TensorSpec("e2m5", ROW), (43.0, 39.3, 32.1, 41.6, 41.5)),
    (TensorSpec("int4", ROW), (16.1, 9.0, 7.3, 15.3, 14.3)),
    # The table's search was over the 15 levels from -7 to 7, which are those of e1m2.
    (TensorSpec("e1m2", ROW, observer="mse"), (18.9, 14.1, 7.4, 17.0, 15.8)),
    (TensorSpec("e2m1", ROW), (18.5, 13.3, 7.9, 16.8, 15.7)),
    (TensorSpec("e2m1", ROW, observer="mse"), (19.0, 16.2, 9.1, 17.2, 17.0)),
    (TensorSpec("e3m0", ROW), (14.2, 14.2, 14.1, 14.2, 14.2)),
    (grouped("int4", 64), (19.4, 16.7, 13.4, 17.9, 16.6)),
    (
        TensorSpec("uint4", Granularity("group", 64), symmetric=False),
        (20.8, 19.0, 16.6, 22.5, 22.4),
    ),
    (grouped("nf4", 64), (20.7, 19.6, 16.0, 19.2, 18.7)),
    (grouped("e2m1", 32, "e8m0", "floor"), (18.8, 18.0, 15.4, 17.6, 17.0)),
    (grouped("e2m1", 32, "e8m0"), (19.0, 18.2, 15.9, 17.9, 17.2)),
    (grouped("e2m1", 16, "e4m3", "nearest"), (20.4, 20.7, 20.9, 20.2, 20.2)),
    (grouped("e2m1", 16, "e4m3", "four-six"), (21.2, 21.3, 21.1, 20.7, 20.6)),
    (grouped("e2m1", 16, "e4m3"), (21.8, 21.7, 21.2, 21.2, 21.1)),
    (grouped("e4m3", 32, "e8m0", "floor"), (30.6, 30.0, 28.3, 29.8, 29.9)),
    (grouped("e4m3", 32, "e8m0", "rceil"), (31.5, 31.5, 31.6, 31.6, 31.5)),
]


@pytest.mark.parametrize(("spec", "expected"), ROWS, ids=[f"{s} {s.observer}" for s, _ in ROWS])
def test_errors_are_those_of_the_table(spec: TensorSpec, expected: tuple[float, ...]) -> None:
    found = [sqnr(fake_quantize(x, choose_scales(x, spec), spec), x) for x in tensors().values()]
    assert found == pytest.approx(expected, abs=0.2)
