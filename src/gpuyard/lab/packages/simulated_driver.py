#!/usr/bin/python3
"""The daemons of a simulated NVIDIA driver: one file, installed by each package under the name of its program.

End as the real programs end, with their words and exit codes, when no driver is loaded or another one than installed.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(os.environ.get("GPUYARD_LAB_ROOT", "/"))
OWN_VERSION = "@VERSION@"


def loaded_version() -> str | None:
    try:
        line = (ROOT / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", line)
    return found.group(1) if found else None


def devices(pattern: str) -> list[Path]:
    return sorted((ROOT / "dev").glob(pattern))


def leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


def stay(opened: list[int]) -> NoReturn:
    """Hold the device files until told to end, as a daemon does that keeps the GPUs awake."""
    signal.signal(signal.SIGTERM, leave)
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"READY=1", address.replace("@", "\0", 1) if address.startswith("@") else address)
    while opened:
        signal.pause()
    sys.exit(1)  # nothing to keep awake


def persistenced(_: list[str]) -> int:
    loaded = loaded_version()
    if loaded is None:
        print(
            "Failed to query NVIDIA devices. Please ensure that the NVIDIA device files (/dev/nvidia*) exist, and that "
            "user 0 has read and write permissions for those files.",
            file=sys.stderr,
        )
        return 1
    if loaded != OWN_VERSION:
        print(
            f"NVRM: API mismatch: the client has the version {OWN_VERSION}, but this kernel module has the version "
            f"{loaded}. Please make sure that they have the same version.",
            file=sys.stderr,
        )
        return 1
    opened = [os.open(device, os.O_RDWR) for device in devices("nvidia[0-9]*")]
    # What NVML goes by when it says "persistence mode: enabled".
    mark = ROOT / "run/nvidia-persistenced/nvidia-persistenced.pid"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(f"{os.getpid()}\n")
    return stay(opened)


def fabric_manager(_: list[str]) -> int:
    loaded = loaded_version()
    switches = devices("nvidia-nvswitch[0-9]*")
    if loaded is None or not switches:
        print(
            "request to query NVSwitch device information from NVSwitch driver failed with error:WARNING Nothing to do "
            "[NV_WARN_NOTHING_TO_DO]",
            file=sys.stderr,
        )
        return 1
    if loaded != OWN_VERSION:
        print(
            f"fabric manager NVIDIA GPU driver interface version {OWN_VERSION} don't match with driver version "
            f"{loaded}. Please update with matching NVIDIA driver package.",
            file=sys.stderr,
        )
        return 1
    opened = [os.open(device, os.O_RDWR) for device in switches]
    # The switches stay configured when their manager ends; loading the driver anew forgets it.
    mark = ROOT / "run/gpuyard-lab/fabric"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(f"{OWN_VERSION}\n")
    return stay(opened)


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "nvidia-persistenced": persistenced,
    "nv-fabricmanager": fabric_manager,
}

if __name__ == "__main__":
    sys.exit(PROGRAMS[Path(sys.argv[0]).name](sys.argv[1:]))
