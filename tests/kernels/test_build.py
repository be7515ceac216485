"""Without a compiler everything runs all the same, with the same numbers, and says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dq.kernels import inputs, onednn
from dq.kernels.native import build, library
from tests.kernels.cases import CONVS, LINEARS, Case


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Forgets what was built, for one test, and puts caches elsewhere."""
    monkeypatch.setattr(build, "_loaded", build._loaded.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("DQ_NATIVE", raising=False)
    return tmp_path


def test_it_is_built_once_into_the_cache(fresh: Path) -> None:
    if build.library() is None:
        pytest.skip(build.why_not())
    (file,) = (fresh / "dq" / "native").iterdir()
    before = file.stat().st_mtime_ns
    assert build.library() is not None
    assert file.stat().st_mtime_ns == before
    assert build.why_not() == ""


def test_users_can_say_no(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQ_NATIVE", "0")
    assert build.library() is None
    assert build.why_not() == "DQ_NATIVE=0 is set"
    assert not list(fresh.iterdir())


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert build.library() is None
    assert "no C compiler is installed (cc, gcc, clang)" in build.why_not()


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no such flag' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert build.library() is None
    assert build.why_not() == f"{broken} failed: no such flag"
    assert not list((fresh / "dq" / "native").iterdir())


def test_a_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "dq").write_text("a file, not a folder")
    assert build.library() is None
    assert build.why_not()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*LINEARS[::3], *CONVS[::3]], ids=str)
def test_results_are_the_same_without(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, a = case.build(dtype)
    geometry = () if case.geometry is None else (case.geometry,)
    run = onednn.linear if case.geometry is None else onednn.conv2d
    native = run(x, a, *geometry)
    for module in (inputs, onednn):
        monkeypatch.setattr(module, "library", lambda: None)
    plain = run(x, a._replace(weight=a.weight.clone()), *geometry)
    # Codes and sums are equal; a fused multiply-add may round the scaling once less.
    assert torch.allclose(native.float(), plain.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.skipif(library() is None, reason="nothing to load")
def test_it_shares_the_threads_of_torch() -> None:
    """A second OpenMP runtime would start as many threads again."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc")
    script = (
        "import torch; from dq.kernels.native import library; library();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.split()[-1] == "1", done.stderr
