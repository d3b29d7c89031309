"""The page cache as the last tier: a model's files read once, so that an engine's start finds them in memory.

Runs with Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import BLOCK

SHARE = 0.5
"""Of the memory that is available: the engine that starts needs some as well."""
SECONDS = 600
"""After which it stops, wherever it is: the engine reads the rest by itself."""
MEMINFO = Path("/proc/meminfo")


def available(meminfo: str) -> int:
    """Bytes that the kernel can give without swapping; what lies in the page cache is among them."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def read_ahead(files: Iterable[Path], bound: int, seconds: float = SECONDS) -> tuple[int, list[Path]]:
    """Read files until one would pass the bound; returns the bytes read and the files left out."""
    total, left, until = 0, [], time.monotonic() + seconds
    buffer = memoryview(bytearray(BLOCK))
    for path in files:
        if total + path.stat().st_size > bound or time.monotonic() > until:
            left.append(path)
            continue
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while (got := file.readinto(buffer)) and time.monotonic() <= until:
                total += got
    return total, left
