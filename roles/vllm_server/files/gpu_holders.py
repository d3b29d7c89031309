#!/usr/bin/python3
"""Refuse to start an engine on a GPU that another process holds, and name that process.

    gpu_holders.py [--allow UNIT]...

An engine that starts on a GPU in use dies minutes later with an allocation error that names nobody. Units given with
--allow hold GPUs by design (the persistence daemon, exporters). With CUDA_VISIBLE_DEVICES only the GPUs it names count.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

DEVICE = re.compile(r"/dev/nvidia(\d+)")


class Holder(NamedTuple):
    """A process that has GPUs open."""

    pid: int
    command: str
    unit: str
    devices: tuple[str, ...]


def unit_of(process: Path) -> str:
    """The systemd unit that a process belongs to, read from its control group."""
    try:
        groups = (process / "cgroup").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    parts = [part for group in groups for part in group.rpartition(":")[2].split("/")]
    return next((part for part in reversed(parts) if part.endswith((".service", ".scope"))), "")


def command_of(process: Path) -> str:
    """The first words of its command line: enough to know it, too little to carry a secret along."""
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")[:3]
    except OSError:
        return "?"
    return b" ".join(words).decode(errors="replace").strip()[:120] or "?"


def holders(proc: Path, wanted: set[str] | None, allowed: set[str]) -> list[Holder]:
    """Processes that have one of the wanted GPUs open; None wants all."""
    found = []
    for process in sorted(path for path in proc.iterdir() if path.name.isdigit()):
        devices = set()
        try:
            links = list((process / "fd").iterdir())
        except OSError:
            continue  # it has ended meanwhile
        for link in links:
            try:
                match = DEVICE.fullmatch(str(link.readlink()))
            except OSError:
                continue
            if match and (wanted is None or match[1] in wanted):
                devices.add(match[0])
        if devices and (unit := unit_of(process)) not in allowed:
            found.append(Holder(int(process.name), command_of(process), unit, tuple(sorted(devices))))
    return found


def visible(value: str) -> set[str] | None:
    """GPU numbers of CUDA_VISIBLE_DEVICES. Names that are no numbers cannot be told apart here: then all count."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    return set(names) if names and all(name.isdigit() for name in names) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow", action="append", default=[], metavar="UNIT")
    parser.add_argument("--proc", type=Path, default=Path("/proc"))
    options = parser.parse_args()
    found = holders(options.proc, visible(os.environ.get("CUDA_VISIBLE_DEVICES", "")), set(options.allow))
    for holder in found:
        end = f"systemctl stop {holder.unit}" if holder.unit.endswith(".service") else f"kill {holder.pid}"
        print(
            f"GPU-BUSY: {', '.join(holder.devices)} held by process {holder.pid} ({holder.command}) of "
            f"{holder.unit or 'no unit'}; an engine needs the GPU alone. End it with `{end}`",
            file=sys.stderr,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
