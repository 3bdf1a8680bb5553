"""What the benchmarks measure with: clocks, bytes read, memory, the page cache, fresh processes."""

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PACKAGES = ("numpy", "zarr", "numcodecs", "xarray", "dask", "torch", "transformers", "ray", "safetensors")


def isolated(work: Callable[..., Any], *arguments: Any) -> Any:
    """Result of ``work`` in a fresh process that has only imported what this one has."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def can_drop_caches() -> bool:
    return os.access(DROP_CACHES, os.W_OK)


def drop_caches() -> None:
    """Empty the page cache, and that of directories and inodes; needs root."""
    os.sync()
    DROP_CACHES.write_text("3")


def bytes_read() -> tuple[int, int]:
    """Bytes that this process got from `read`, and those that were fetched from storage for it, mapped files too."""
    fields = dict(re.findall(r"(\w+): (\d+)", Path("/proc/self/io").read_text()))
    return int(fields["rchar"]), int(fields["read_bytes"])


def reset_peak() -> int:
    """Forget the peak of this process's resident memory; returns its bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes of resident memory since ``reset_peak``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def describe_machine(folder: Path) -> dict[str, Any]:
    """Where, when and with what the figures were taken."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    mount = max((where for where, _ in mounts if folder.is_relative_to(where)), key=len)
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory[1]) / 1e6) if memory else None,
        "kernel": platform.release(),
        "file_system": dict(reversed(mounts))[mount],
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
