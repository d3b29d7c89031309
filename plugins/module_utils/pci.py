"""What the kernel lists of the PCI bus. Python 3.9 and the standard library alone."""

from __future__ import annotations

from pathlib import Path


def read(file: Path) -> str:
    """A device may vanish between listing and reading; then it is not there."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def find(root: Path, vendor: str, beginning: str, of: str = "class") -> list[str]:
    """Addresses of the devices of a vendor whose class, or device number, begins so; sorted."""
    if not root.is_dir():
        return []
    return sorted(
        device.name
        for device in root.iterdir()
        if read(device / "vendor") == vendor and read(device / of).startswith(beginning)
    )
