"""The record of a run: one line per event, each with the hash of the line before it, so that no line can be changed,
taken out or put in unseen. It is appended to and never rewritten.

The hash of the last line, kept elsewhere (a ticket, a log server), is what also shows that the end was not cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpuyard.spec.errors import RefusedError

BEGINNING = "0" * 64


class RecordError(RefusedError):
    """A record that was not written by `append` alone."""


def append(path: Path, event: Mapping[str, Any]) -> dict[str, Any]:
    """Write one event behind the others; on the disk when this returns. Raises RecordError for a damaged record.

    A last line without its end was being written when its writer died: nobody was told of it, so it goes.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        line = {
            "n": len(lines),
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "before": digest_of(lines[-1]) if lines else BEGINNING,
            **event,
        }
        file.truncate(len(whole))
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a record. Raises RecordError where the chain of hashes is broken, with the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordError(
            "RECORD-MISSING", str(path), error.strerror or "", "`gpuyard runs` lists the records"
        ) from error
    events: list[dict[str, Any]] = []
    before = BEGINNING
    for number, line in enumerate(lines):
        try:
            event = json.loads(line)
            kept = (event["n"], event["before"])
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines) - 1 and number:
                break  # being written now, or when its writer died
            raise _broken(path, number) from error
        if kept != (number, before):
            raise _broken(path, number)
        events.append(event)
        before = digest_of(line)
    return events


def head_of(path: Path) -> str:
    """The hash of the last whole line, to be kept elsewhere."""
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    return digest_of(lines[-1]) if lines else BEGINNING


def digest_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _broken(path: Path, number: int) -> RecordError:
    why = "it is not the line that the hashes around it were made of"
    return RecordError(
        "RECORD-BROKEN", f"{path}, line {number + 1}", why, "take the record from where it was copied to"
    )
