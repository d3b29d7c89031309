"""Room for models on a node's own disk: which versions stay whatever comes, and which are given up for a new one.

A version's last use is the last converge at which the lock or a unit's file named it; the record beside it, which says
how its files look, carries that moment as its time of change. Access times would not do: disks of models are mounted
without them. Runs with Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import ModelError

GIB = 2**30
SPARE = 256 * 1024 * 1024
"""Bytes that stay free beside the models: a full disk stops more than one download."""


@dataclass(frozen=True)
class Held:
    """One folder below a model's: a version, or what a killed run left of one (then its name begins with a dot)."""

    path: Path
    size: int
    used: float


@dataclass(frozen=True)
class Room:
    """How much may lie there."""

    budget: int
    """Bytes that all models together may take; 0 is no bound, and then nothing is given up."""
    free: int
    """Bytes that the disk has free."""


def record_of(version: Path) -> Path:
    """Where is written how a version's files look, and when it was used last."""
    return version.with_name(f".{version.name}.stat")


def folders_in(root: Path) -> Iterator[Path]:
    """The folder of every version of every model, and every remain."""
    for home in sorted(root.iterdir()) if root.is_dir() else []:
        for path in sorted(home.iterdir()) if home.is_dir() and not home.is_symlink() else []:
            if path.is_dir() and not path.is_symlink():
                yield path


def held_in(root: Path) -> list[Held]:
    """The same with what each takes, for which every file is looked at."""
    found = []
    for path in folders_in(root):
        record = record_of(path)
        used = (record if record.is_file() else path).stat().st_mtime
        found.append(Held(path, size_of(path), 0.0 if path.name.startswith(".") else used))
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum((Path(here) / name).lstat().st_size for here, _, names in os.walk(folder) for name in names)


def kept(held: Sequence[Held], locked: Collection[Path], keep: int, texts: Sequence[str]) -> set[Path]:
    """What is never given up: what the lock names, what a unit's file names, and the way back of a locked model."""
    stays = {item.path for item in held if any(str(item.path) in text for text in texts)}
    for item in held:
        stem = item.path.with_name(item.path.name.lstrip(".").partition(".")[0])
        if item.path in locked or (stem in locked and item.path.name.endswith(".partial")):
            stays.add(item.path)
    for home in {path.parent for path in locked}:
        versions = [path for path in (item.path for item in held) if path.parent == home and path.name[0] != "."]
        others = sorted((path for path in versions if path not in locked), key=lambda path: -path.stat().st_mtime)
        stays.update(others[: keep - 1])
    return stays


def to_give_up(
    what: str, need: int, root: Path, held: Sequence[Held], stays: Collection[Path], room: Room, replaced: Path
) -> list[Path]:
    """The versions to remove so that `need` bytes more fit, least recently used first. Refuses before one is removed.

    `replaced` is the wanted version's own folder: where it lies there damaged, the new one takes its place.
    """
    there = sum(item.size for item in held if item.path != replaced)
    over = there + need - room.budget if room.budget else 0
    short = need + SPARE - room.free
    missing = max(over, short, 0)
    loose = sorted((item for item in held if item.path not in stays), key=lambda item: (item.used, item.path))
    given: list[Held] = []
    for item in loose if room.budget else []:
        if sum(one.size for one in given) >= missing:
            break
        given.append(item)
    won = sum(item.size for item in given)
    if over > won:
        fixed = there - won
        raise ModelError(
            "MODEL-ROOM",
            f"{root} may hold {room.budget / GIB:.2f} GiB and holds {there / GIB:.2f} GiB, of which {fixed / GIB:.2f} "
            f"GiB stay: they are locked, in use or the way back. {what} needs {need / GIB:.2f} GiB more; "
            f"set model_store_budget_gib to {math.ceil((fixed + need) / GIB)}, or serve fewer models on this node",
        )
    if short > won:
        raise ModelError(
            "MODEL-DISK",
            f"{root} has {room.free / GIB:.2f} GiB free, {what} needs {(need + SPARE) / GIB:.2f} GiB; "
            f"free {(short - won) / GIB:.2f} GiB more, or give it a larger disk",
        )
    return [item.path for item in given]


def give_up(path: Path) -> None:
    """Remove one version. Renamed first: a folder half removed must not keep the name of a model."""
    gone = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.old"))
    shutil.rmtree(gone)
    record_of(path).unlink(missing_ok=True)


def mark_used(root: Path, texts: Sequence[str]) -> None:
    """Write down which versions units use now."""
    for path in folders_in(root):
        if any(str(path) in text for text in texts) and record_of(path).is_file():
            os.utime(record_of(path))
