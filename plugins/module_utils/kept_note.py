"""A note that outlives a crash of whoever wrote it. Python 3.9 and the standard library alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class NoteError(Exception):
    """What was found, why it is refused, the smallest change that would pass."""


def read(path: Path, version: int) -> dict[str, Any] | None:
    """The note, or None where there is none. Raises NoteError for one that was not written by `write`."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise NoteError(f"UPGRADE-NOTE: {path} is no note ({error}). Look at the node before you remove it") from error
    found = data.get("version") if isinstance(data, dict) else None
    if found != version:
        raise NoteError(
            f"UPGRADE-NOTE: {path} has version {found!r}, {version} is known. Use the gpuyard that wrote it"
        )
    if data.pop("checksum", None) != _checksum(data):
        raise NoteError(f"UPGRADE-NOTE: {path} was changed by hand. Look at the node before you remove it")
    return data


def write(path: Path, note: dict[str, Any]) -> None:
    """Whole or not at all, and on the disk when this returns."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with half.open("w") as file:
        json.dump({**note, "checksum": _checksum(note)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the names in it are on the disk: a rename alone may be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One at a time reads and writes a note. What is done meanwhile takes no time, so nobody waits for long."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _checksum(note: dict[str, Any]) -> str:
    plain = json.dumps({key: value for key, value in note.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
