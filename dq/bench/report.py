"""What a benchmark found: numbers with the machine they belong to, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch

import dq
from dq.bench.profile import Operator
from dq.tables import aligned

__all__ = ["Machine", "Measurement", "Report"]

_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class Machine:
    """Where and when it was measured.

    Args:
        cpu: Model name and the instruction sets that matter.
        card: Model name; None where the CPU computed.
        cores: That the process may use.
        threads: That torch used.
        load: Processes that wanted a core in the minute before, this one included.
        torch: Version; likewise `diffusers` and `dq`.
        date: ISO.
    """

    cpu: str
    card: str | None
    cores: int
    threads: int
    load: float
    torch: str
    diffusers: str
    dq: str
    date: str

    @classmethod
    def here(cls, threads: int, device: str = "cpu") -> Self:
        """Describe this machine, now."""
        return cls(
            cpu=_cpu(),
            card=torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
            cores=_cores(),
            threads=threads,
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
            torch=str(torch.__version__),
            diffusers=diffusers.__version__,
            dq=dq.__version__,
            date=datetime.date.today().isoformat(),
        )

    @property
    def where(self) -> str:
        """The card, or else the CPU."""
        return self.card or self.cpu


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in file.read_text().splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = set(facts.get("flags", "").split())
    units = ", ".join(unit for unit in _UNITS if unit in flags)
    return f"{facts.get('model name', platform.machine())} ({units})"


@dataclass(frozen=True)
class Measurement:
    """One denoiser in one form. Times are of one forward call.

    Args:
        milliseconds: Median on the clock.
        spread: Distance of the quartiles on the clock, milliseconds.
        ratio_to_bf16: Median over the median of bf16, which ran in the same rounds: of compiled
            bf16 for what is compiled as a whole, else of bf16 as it is.
        cpu_milliseconds: Median of the process's time, all threads together.
        cpu_ratio_to_bf16: Likewise; on a busy machine the one to trust.
        relative_error: L2 norm of the output's difference to fp32, over the norm of fp32's output.
        stored_megabytes: All tensors of the model, 1e6 bytes; None if unknown, like the next two.
        resident_megabytes: The same with the copies that kernels keep.
        peak_megabytes: The same with what a forward call takes for a while.
        compute_paths: Number of linear and convolution layers by what they compute on.
        layout: "channels_last" or "contiguous", whichever was faster.
        note: Which kernels multiplied, from the profiler; where it equals another variant, which.
        operators: The slowest operators, from the profiler.
    """

    milliseconds: float
    spread: float
    ratio_to_bf16: float
    cpu_milliseconds: float
    cpu_ratio_to_bf16: float
    relative_error: float
    stored_megabytes: float | None
    resident_megabytes: float | None
    peak_megabytes: float | None
    compute_paths: Mapping[str, int]
    layout: str
    note: str
    operators: tuple[Operator, ...]

    def is_slower(self) -> bool:
        """Whether it took longer than bf16, on the clock or in the process's time."""
        return max(self.ratio_to_bf16, self.cpu_ratio_to_bf16) > 1


@dataclass(frozen=True)
class Report:
    """A whole benchmark.

    Args:
        machine: Where.
        settings: Arguments of the run: batch, repeats, seed, device.
        models: Measurements by model and variant.
    """

    machine: Machine
    settings: Mapping[str, int | str]
    models: Mapping[str, Mapping[str, Measurement]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def profile(self) -> str:
        """Return the operators that took longest, a table a model."""
        tables = (_profiles(model, measured) for model, measured in self.models.items())
        return "\n\n".join("\n".join(lines) for lines in tables)

    def __str__(self) -> str:
        here = self.machine
        lines = [
            f"{here.where}, {here.cores} cores, {here.threads} threads, load {here.load}; "
            f"torch {here.torch}, diffusers {here.diffusers}, dq {here.dq}; {here.date}",
            ", ".join(f"{name} {value}" for name, value in self.settings.items()),
        ]
        for model, measured in self.models.items():
            lines += ["", *_table(model, measured)]
        return "\n".join(lines)


_HEAD = ("ms", "±", "x bf16", "cpu ms", "x bf16", "error", "stored MB", "in memory", "peak",
         "layout")  # fmt: skip


def _table(model: str, measured: Mapping[str, Measurement]) -> Iterator[str]:
    rows = [(model, *_HEAD), *((name, *_cells(entry)) for name, entry in measured.items())]
    yield from aligned(rows, right=True)
    for name, entry in measured.items():
        yield f"  {name}: {entry.note}"
    slower = [name for name, entry in measured.items() if entry.is_slower()]
    yield f"  slower than bf16 by either clock: {', '.join(slower) or 'none'}"


def _profiles(model: str, measured: Mapping[str, Measurement]) -> Iterator[str]:
    """List the operators of all variants side by side, the slowest on top."""
    names = list(dict.fromkeys(o.name for e in measured.values() for o in e.operators))
    times = {n: {o.name: o.milliseconds for o in e.operators} for n, e in measured.items()}
    widths = [max(8, len(name)) for name in measured]
    yield "  ".join(
        [f"{model}, ms".ljust(46), *(n.rjust(w) for n, w in zip(times, widths, strict=True))]
    )
    for name in sorted(names, key=lambda n: -max(t.get(n, 0) for t in times.values())):
        cells = (f"{t[name]:.1f}" if name in t else "" for t in times.values())
        yield "  ".join([name.ljust(46), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])


def _cells(entry: Measurement) -> tuple[str, ...]:
    sizes = entry.stored_megabytes, entry.resident_megabytes, entry.peak_megabytes
    return (
        f"{entry.milliseconds:.1f}", f"{entry.spread:.1f}", f"{entry.ratio_to_bf16:.3f}",
        f"{entry.cpu_milliseconds:.1f}", f"{entry.cpu_ratio_to_bf16:.3f}",
        f"{entry.relative_error:.1e}",
        *("?" if size is None else f"{size:.1f}" for size in sizes), entry.layout,
    )  # fmt: skip
