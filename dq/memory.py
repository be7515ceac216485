"""Memory of the process: what a call takes beyond what was there before, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["give_back", "peak_allocated", "peak_growth", "peak_on_card", "peak_resident"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_growth(run: Callable[[], object]) -> int | None:
    """Return the growth of the process's resident memory during a call, bytes.

    Memory that earlier calls have freed is given back to the system first, so that its reuse counts
    too. None where the system does not tell: it takes Linux.
    """
    if not sys.platform.startswith("linux") or not _CLEAR.exists():
        return None
    gc.collect()
    give_back()
    try:
        _CLEAR.write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _field("VmRSS")
    run()
    return max(0, _field("VmHWM") - before)


def peak_allocated(run: Callable[[], object]) -> int | None:
    """Return the growth of the memory that a call allocates, bytes, looked at every millisecond.

    Unlike `peak_growth` it leaves out pages of mapped files, which the system takes back whenever
    it likes. None where the system does not tell: it takes Linux.
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    give_back()
    before = peak = _field("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, _field("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(0, max(peak, _field("RssAnon")) - before)


def peak_on_card(run: Callable[[], object]) -> int:
    """Return the growth of what tensors take on the current CUDA device during a call, bytes."""
    from torch import cuda

    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    run()
    cuda.synchronize()
    return cuda.max_memory_allocated() - before


def peak_resident() -> int | None:
    """Return the most memory that this process ever had at a time, bytes, libraries included.

    None where the system does not tell: it takes Linux.
    """
    return _field("VmHWM") or None if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Give memory that was freed back to the system.

    glibc keeps it, and where blocks that live on lie between those that were freed, it grows by as
    much again. Elsewhere nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _field(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
