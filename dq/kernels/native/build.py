"""Compile the C sources of this folder and load them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dq.folders import cache_folder

__all__ = ["library", "why_not"]

_HERE = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-O3", "-march=native", "-fPIC", "-shared", "-std=gnu11", "-Wno-psabi",
    # Lets loops with rintf become vectors. No -ffast-math: it changes the whole process's floats.
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and "", or None and the reason."""
    if os.environ.get("DQ_NATIVE") == "0":
        return None, "DQ_NATIVE=0 is set"
    if sys.platform == "win32":
        return None, "there is no recipe for Windows' compilers"
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None, f"no C compiler is installed ({', '.join(_COMPILERS)})"
    try:
        return ctypes.CDLL(str(_built(compiler))), ""
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return None, f"{compiler} failed: {said.strip().splitlines()[0] if said.strip() else error}"


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None if this machine cannot build them."""
    return _loaded()[0]


def why_not() -> str:
    """Say why there is no library; empty if there is one."""
    return _loaded()[1]


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.c"))


def _threads() -> list[list[str]]:
    """Return flags to try, best first: torch's own OpenMP runtime, the compiler's, none.

    Two runtimes in one process would each start threads of its own.
    """
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    flags = [["-fopenmp"], []]
    return [["-fopenmp", "-Wl,--no-as-needed", str(own[0])], *flags] if own else flags


def _key(compiler: str) -> str:
    """Return a name for what the result depends on: sources, flags, compiler, processor, torch."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    facts = [version.stdout, *_FLAGS, _processor(), torch.__version__, torch.__file__]
    digest = hashlib.sha256("\n".join(facts).encode())
    for file in [*_sources(), *sorted(_HERE.glob("*.h"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Return the instruction sets; a home folder may be shared by different machines."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))),
                platform.processor())  # fmt: skip


def _built(compiler: str) -> Path:
    target = cache_folder() / "native" / f"{_key(compiler)}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        tries = _threads()
        for index, threads in enumerate(tries):
            command = [compiler, *_FLAGS, *map(str, _sources()), *threads, "-lm", "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            if index == len(tries) - 1:
                done.check_returncode()
        made.replace(target)  # at once: another process may be building the same
    return target
