"""What is broken on a node, written down before it is broken and struck out after it is mended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpuyard.lab.errors import LabError
from gpuyard.lab.faults.model import Injection
from gpuyard.lab.place import Place, write_json

VERSION = 1
WAITING, BREAKING, BROKEN, MENDING, FAILED = "waiting", "breaking", "broken", "mending", "failed"


@dataclass(frozen=True, slots=True)
class Entry:
    """One fault of one node, and how far it is."""

    injection: Injection
    stage: str
    due: float = 0
    """When a waiting one breaks, in seconds since 1970."""
    said: str = ""
    """Why one that waited could not be broken."""

    def at(self, stage: str, said: str = "") -> Entry:
        return replace(self, stage=stage, said=said)


Record = dict[str, Entry]


def folder(place: Place) -> Path:
    return place.state / "faults"


def read(place: Place, node: str) -> Record:
    """What is written of a node. One that was written by hand, or by another gpuyard, is not believed."""
    path = folder(place) / f"{node}.json"
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    change = f"`gpuyard lab mend {node} --all` mends whatever may be broken there and begins the record anew"
    try:
        found = json.loads(text)
        version, digest, entries = found["version"], found["digest"], found["entries"]
    except (ValueError, TypeError, KeyError) as error:
        raise LabError("FAULT-STATE", f"{path} is damaged", str(error), change) from error
    if version != VERSION:
        raise LabError("FAULT-STATE", f"{path} has version {version}", f"this gpuyard writes {VERSION}", change)
    if digest != digest_of(entries):
        raise LabError("FAULT-STATE", f"{path} was changed by hand", "its digest is another one", change)
    return {fault: _entry(entry) for fault, entry in entries.items()}


def write(place: Place, node: str, record: Mapping[str, Entry]) -> None:
    path = folder(place) / f"{node}.json"
    if not record:
        path.unlink(missing_ok=True)
        return
    entries = {fault: _plain(entry) for fault, entry in sorted(record.items())}
    write_json(path, {"version": VERSION, "digest": digest_of(entries), "entries": entries})


def read_all(place: Place) -> dict[str, Record]:
    return {path.stem: read(place, path.stem) for path in sorted(folder(place).glob("[!.]*.json"))}


def digest_of(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


def _plain(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "injection": {**asdict(entry.injection), "values": dict(entry.injection.values)}}


def _entry(plain: Mapping[str, Any]) -> Entry:
    return Entry(Injection(**plain["injection"]), plain["stage"], plain["due"], plain["said"])
