"""Wait until a fault is due, then break it. Runs with root's rights, in the lab's own control group."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gpuyard.lab.faults import record, rim
from gpuyard.lab.models import LabRef
from gpuyard.lab.place import Place


def main(project: str, stack: str, cache: str, node: str, fault: str) -> None:
    place = Place(LabRef(project=Path(project), stack=stack), Path(cache))
    entry = record.read(place, node).get(fault)
    if entry is None:
        return
    while (left := entry.due - time.time()) > 0:
        time.sleep(min(left, 60))  # a clock that was set meanwhile is noticed
    rim.fire(place, node, fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
