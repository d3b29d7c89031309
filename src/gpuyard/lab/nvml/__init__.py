"""The simulated NVML, in C, and the real nvidia-smi that asks it: made by set-up, shipped in the packages."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gpuyard.lab.errors import LabError

FOLDER = Path(__file__).parent
LIBRARY, SMI = "libnvidia-ml.so", "nvidia-smi"


def digest() -> str:
    """Changes with everything the two are made of. tools/steps/nodes.py names what it builds by the same."""
    sources = sorted([*FOLDER.glob("*.[ch]"), FOLDER / "nvidia-smi.json", FOLDER / "build.sh"])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def built(cache: Path) -> Path:
    """The folder that set-up made, with the library and nvidia-smi in it."""
    folder = cache / "lab" / f"nvml-{digest()}"
    missing = [name for name in (LIBRARY, SMI) if not (folder / name).is_file()]
    if missing:
        found = f"{' and '.join(missing)} not in {folder}"
        raise LabError("LAB-NVML", found, change="run `make setup`, which makes them")
    return folder
