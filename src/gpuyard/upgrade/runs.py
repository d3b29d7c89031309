"""What a run came to, read from its record: who changed what, and how long each node was in which state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from gpuyard.upgrade import record
from gpuyard.upgrade.record import RecordError

AT_REST = ("upgrade-done", "rollback-done", "rollback-failed")
"""Where a node may stay; a test holds this against the table of states."""

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stay:
    """A node in one state, from when until when; without an end where it is there still."""

    state: str
    begun: datetime
    ended: datetime | None
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        return None if self.ended is None else (self.ended - self.begun).total_seconds()


@dataclass(slots=True)
class Walk:
    """A node's way through a run."""

    node: str
    previous: str
    target: str
    attempts: int
    stays: list[Stay] = field(default_factory=list[Stay])
    proof: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def state(self) -> str:
        return self.stays[-1].state

    @property
    def reason(self) -> str:
        return self.stays[-1].reason


@dataclass(frozen=True, slots=True)
class Run:
    id: str
    fleet: str
    kind: str
    target: str
    asked: Event
    """What it was begun with: policy, limit, soak_seconds, soak_every, back, allow_downgrade."""
    operators: tuple[str, ...]
    """Whoever held the fleet, first to last: name@host."""
    begun: datetime
    ended: datetime | None
    result: str
    """"done", "halted", or "refused" before a node was touched; "" where nobody has ended it."""
    walks: Mapping[str, Walk]
    head: str
    """Hash of the last line of the record."""

    def as_dict(self) -> dict[str, Any]:
        nodes = {
            name: {
                "state": walk.state,
                "previous": walk.previous,
                "target": walk.target,
                "attempts": walk.attempts,
                "reason": walk.reason,
                "seconds": {stay.state: stay.seconds for stay in walk.stays if stay.seconds is not None},
            }
            for name, walk in self.walks.items()
        }
        return {
            "run": self.id,
            "fleet": self.fleet,
            "kind": self.kind,
            "target": self.target,
            "back": bool(self.asked.get("back")),
            "operators": list(self.operators),
            "begun": self.begun.isoformat(),
            "ended": self.ended.isoformat() if self.ended else None,
            "result": self.result or "open",
            "nodes": nodes,
            "head": self.head,
        }


def run_of(path: Path) -> Run:
    """The run whose record this is. Raises RecordError for one that is damaged, or that no run has begun."""
    events = record.read(path)
    claims = [event for event in events if event["event"] == "claimed"]
    if not claims:
        raise RecordError("RECORD-EMPTY", str(path), "no run was begun in it", "`gpuyard runs` lists the others")
    first = claims[0]
    over = events[-1] if events[-1]["event"] == "released" else None
    return Run(
        id=first["run"],
        fleet=first["fleet"],
        kind=first["kind"],
        target=first["target"],
        asked=claims[-1],
        operators=tuple(dict.fromkeys("{name}@{host}".format(**event["operator"]) for event in claims)),
        begun=moment(first),
        ended=moment(over) if over else None,
        result=over["result"] if over else "",
        walks=walks_of(events),
        head=record.head_of(path),
    )


def walks_of(events: Sequence[Event]) -> dict[str, Walk]:
    walks: dict[str, Walk] = {}
    for event in events:
        if event["event"] != "state":
            continue
        name, at = event["node"], moment(event)
        walk = walks.setdefault(name, Walk(name, event["previous"], event["target"], event["attempts"]))
        walk.attempts = event["attempts"]
        walk.proof = {**walk.proof, **(event.get("proof") or {})}
        if walk.stays and walk.stays[-1].state == event["state"]:
            continue  # taken up again where it stood
        if walk.stays:
            last = walk.stays[-1]
            walk.stays[-1] = Stay(last.state, last.begun, at, last.reason)
        walk.stays.append(Stay(event["state"], at, None, event["reason"]))
    return walks


def out_of_rotation(walk: Walk) -> float:
    """Seconds from when a node was emptied until it served again, or until it came to rest."""
    serving = ("upgrade-required", "soak-required", *AT_REST)
    return sum(stay.seconds or 0 for stay in walk.stays if stay.state not in serving)


def typical(runs: Iterable[Run]) -> dict[str, float]:
    """Seconds that nodes have stayed in each state, the median over all that was recorded."""
    seen: dict[str, list[float]] = {}
    for run in runs:
        for walk in run.walks.values():
            for stay, following in pairwise(walk.stays):
                # What went wrong took as long as it took to go wrong.
                if stay.seconds is not None and following.state != "rollback-required":
                    seen.setdefault(stay.state, []).append(stay.seconds)
    return {state: median(all_seconds) for state, all_seconds in seen.items() if state != "upgrade-required"}


def moment(event: Event) -> datetime:
    return datetime.fromisoformat(event["at"])
