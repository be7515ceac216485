import dataclasses

import pytest
import torch

from dq.kernels import Kernel, Site, choose, kernels, reference
from tests.kernels.cases import CONVS, LINEARS, Case

SITE = Site("linear", "cpu", 16, 32, "int8", "int8")
CPU = torch.device("cpu")


def site(case: Case) -> Site:
    if case.geometry is None:
        return Site("linear", "cpu", case.rows, case.columns, "int8", "int8")
    groups = case.geometry.groups
    return Site("conv2d", "cpu", case.rows, case.columns, "int8", "int8", groups)


SERVED = [
    (name, case)
    for name, kernel in kernels.items()
    for case in (*LINEARS, *CONVS)
    if kernel.refuses(site(case)) is None
]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "case"), SERVED, ids=str)
def test_every_kernel_equals_its_reference(
    name: str, case: Case, dtype: torch.dtype, keep: bool
) -> None:
    x, a = case.build(dtype)
    a = a._replace(keep=keep)
    if case.geometry is None:
        expected = reference.linear(x, a)
        y = kernels[name].run(x, a)
    else:
        expected = reference.conv2d(x, a, case.geometry)
        y = kernels[name].run(x, a, case.geometry)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    # Products are exact; scaling rounds once or twice, in float32 and then in the dtype.
    size = float(expected.abs().max()) + 1
    assert torch.allclose(
        y.float(), expected.float(), rtol=2.1 * torch.finfo(dtype).eps, atol=4e-7 * size
    )


def test_integer_layers_on_the_cpu_are_served() -> None:
    served = [case for _, case in SERVED]
    assert all(case in served for case in (*LINEARS, *CONVS))
    assert choose(SITE) is kernels["onednn_linear"]
    assert choose(dataclasses.replace(SITE, kind="conv2d")) is kernels["onednn_conv2d"]


@pytest.mark.parametrize(
    "change",
    [
        {"weight": "other"},
        {"input": "float"},
        *({"weight": kind, "input": kind} for kind in ("fp8", "nvfp4", "mxfp4", "mxfp8")),
        {"kind": "conv3d"},
        {"device": "mps"},
    ],
)
def test_sites_that_none_serves_unpack(change: dict[str, str]) -> None:
    assert choose(dataclasses.replace(SITE, **change)) is None
    for _, kernel in kernels.items():
        assert kernel.refuses(dataclasses.replace(SITE, **change))


@pytest.mark.parametrize("name", kernels.names())
def test_self_tests_pass_where_the_kernel_serves(name: str) -> None:
    kernel = kernels[name]
    served = [s for s in (SITE, dataclasses.replace(SITE, kind="conv2d")) if not kernel.refuses(s)]
    if not served:
        pytest.skip("serves no site on the CPU")
    assert kernel.check(CPU)


@pytest.fixture
def fastest():
    """Registers a kernel above all others; it is forgotten afterwards."""
    added = []

    def add(check) -> Kernel:
        kernel = Kernel("test", 99, lambda site: None, lambda x, a: x, check)
        added.append(kernels.add("test", kernel))
        return kernel

    yield add
    for _ in added:
        del kernels._entries["test"]


def test_the_highest_priority_is_taken(fastest) -> None:
    assert choose(SITE) is not fastest(lambda device: True)
    assert choose(SITE) is kernels["test"]


def _raise(device: torch.device) -> bool:
    raise RuntimeError("no such op\nand a long trace")


def _refuse(device: torch.device) -> bool:
    raise ValueError("this build takes no swizzle")


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (lambda device: False, "kernel test is not used on cpu: its product is wrong"),
        (_raise, "kernel test is not used on cpu: no such op$"),
        (_refuse, "kernel test is not used on cpu: this build takes no swizzle$"),
    ],
)
def test_a_kernel_that_fails_its_self_test_is_left_out_with_one_warning(
    fastest, check, text: str, recwarn: pytest.WarningsRecorder
) -> None:
    fastest(check)
    for _ in range(3):
        assert choose(SITE) is kernels["onednn_linear"]
    (warning,) = recwarn
    assert text.removesuffix("$") in str(warning.message)
    assert "\n" not in str(warning.message)
