"""What a call takes from the system while it runs, beyond what was there before."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["peak_growth"]

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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _field("VmRSS")
    run()
    return max(0, _field("VmHWM") - before)


def _field(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
