#!/usr/bin/python3
"""What a running engine was started from, and whether the node still holds the same.

A unit records the digests of its files when it starts; converging compares them with the files now. So an engine that
runs on old settings is found whatever happened in between: a converge that was killed after it wrote a file and before
it restarted the engine, a reboot, a restart by hand.

As a program, run by the unit: `engine_inputs.py INSTANCE` records. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

HELPERS = "/usr/local/lib/gpuyard"


def inputs(instance: str, root: Path = Path("/")) -> list[Path]:
    """The files that decide how one engine runs. The versions of engine and model stand in the drop-in, as paths."""
    units = root / "etc/systemd/system"
    settings = root / "etc/vllm"
    return [
        units / "vllm@.service",
        *sorted((units / f"vllm@{instance}.service.d").glob("*.conf")),
        settings / f"{instance}.yaml",
        settings / f"{instance}.env",
        settings / "credentials" / f"{instance}.key",
        root / HELPERS.lstrip("/") / "engine_run",
    ]


def digests(instance: str, root: Path = Path("/")) -> dict[str, str]:
    """Path → SHA-256 of each file; a file that is not there has no digest."""
    found = {}
    for path in inputs(instance, root):
        try:
            found[f"/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            continue
    return found


def record_file(instance: str, root: Path = Path("/")) -> Path:
    """Where a start is recorded: gone after a reboot, as the engine is."""
    return root / "run/gpuyard/engines" / f"{instance}.json"


def record(instance: str, root: Path = Path("/")) -> None:
    """Write down what this start is made from."""
    path = record_file(instance, root)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    with open(draft, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(digests(instance, root), file)
    draft.replace(path)


def changed(instance: str, root: Path = Path("/")) -> list[str]:
    """Files that are not what the engine was started from. Without a record all of them count."""
    try:
        then = json.loads(record_file(instance, root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        then = {}
    now = digests(instance, root)
    return sorted(path for path in {*then, *now} if then.get(path) != now.get(path))


if __name__ == "__main__":
    record(sys.argv[1])
