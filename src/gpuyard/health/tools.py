"""How probes ask a node's tools and its kernel: with a deadline, and without failing when there is no answer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

# A GPU that fell off the bus makes nvidia-smi hang for minutes; that is an answer too. Without the persistence daemon,
# nvidia-smi itself takes seconds for each GPU: half a minute is more than eight of them need.
DEADLINE_SECONDS = 30

NVIDIA = "0x10de"
# Class codes as the kernel writes them: VGA and 3D controllers are GPUs; an NVSwitch is a bridge of the kind "other".
GPU_CLASSES = ("0x0300", "0x0302")
NVSWITCH_CLASSES = ("0x0680",)

HUNG: dict[str, float] = {}
"""Seconds in which a program gave no answer, by its name: it is not asked again in the life of this program."""

PCI_ROOT = "/sys/bus/pci/devices"


class Answer(NamedTuple):
    """What a tool said. `ok` is false when it is missing, failed or did not end in time."""

    ok: bool
    text: str


def ask(*command: str) -> Answer:
    if command[0] in HUNG:
        # What hangs in the driver hangs for each question, and somebody waits for the verdict.
        return Answer(False, f"{command[0]} did not answer another question in {HUNG[command[0]]} s")
    # Fixed locale: what is read here is written for programs, not translated for people.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_SECONDS,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        return Answer(False, f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        HUNG[command[0]] = DEADLINE_SECONDS
        return Answer(False, f"{command[0]} did not answer in {DEADLINE_SECONDS} s")
    except OSError as wrong:
        return Answer(False, f"{command[0]}: {wrong.strerror}")
    return Answer(done.returncode == 0, done.stdout.decode(errors="replace").strip())


def read(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return None


def pci_devices(root: str, classes: tuple[str, ...]) -> list[str]:
    """Addresses of NVIDIA's devices of these classes, as the kernel lists them."""
    folder = Path(root)
    if not folder.is_dir():
        return []
    return sorted(
        device.name
        for device in folder.iterdir()
        if read(device / "vendor") == NVIDIA and (read(device / "class") or "").startswith(classes)
    )
