"""The kernel has told of no Xid since a mark, but for those that are only written down.

The mark is a cursor of the journal: it names the boot and how long that had been running, and the journal finds it by
its own numbering. A clock that is set in between changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpuyard.health import tools
from gpuyard.health.gpu_count import short
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict
from gpuyard.health.xid_catalog import INFO, QUARANTINE, RECOVERY_ACTION_CHANGED, RECOVERY_ACTIONS, XIDS, Xid

CHECK = "check_xid"

# "NVRM: Xid (PCI:0000:19:00): 79, …"; older drivers leave out "PCI:", and what follows an address is a part of the GPU.
LINE = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)(?: [^)]*)?\): ([0-9]+)")
ANY = "NVRM: Xid"
NEW_ACTION = re.compile(r"recovery action changed from \S+ \([^)]*\) to (0x[0-9a-fA-F]+|[0-9]+)")

CURSOR = re.compile(r"s=[0-9a-f]+;i=[0-9a-f]+;b=([0-9a-f]{32});m=([0-9a-f]+);t=[0-9a-f]+;x=[0-9a-f]+")

JOURNAL = ("journalctl", "--quiet", "--no-pager", "--all", "--output=json", "--output-fields=MESSAGE,_BOOT_ID")


class JournalError(Exception):
    """Where the journal does not answer, nobody knows what the kernel said."""


def mark() -> str:
    """This moment, for `since`."""
    _sync()
    entries = _entries("--lines=1")
    if not entries:
        raise JournalError("the journal is empty")
    return str(entries[-1]["__CURSOR"])


def probe(since: str) -> Verdict:
    match = CURSOR.fullmatch(since)
    if match is None:
        wrong = f"since is {since!r}, which is no mark; take one before the change: node_health's verb mark"
        return Verdict(CHECK, UNHEALTHY, wrong)
    try:
        _sync()
        first = _entries(f"--cursor={since}", "--lines=1")
        # From the mark on, not after it: with a filter some versions of journalctl leave out one more than the mark.
        said = _entries(f"--cursor={since}", "_TRANSPORT=kernel")
    except JournalError as wrong:
        return Verdict(CHECK, UNHEALTHY, f"what the kernel said cannot be known: {wrong}", {"since": since})
    if not first or first[0].get("__CURSOR") != since:
        wrong = "the journal does not reach back to the mark, so what the kernel has said since cannot be known"
        return Verdict(CHECK, UNHEALTHY, wrong, {"since": since})
    return judge(since, newer(said, match.group(1), int(match.group(2), 16)))


def newer(entries: Sequence[Mapping[str, Any]], boot: str, microseconds: int) -> list[str]:
    """The kernel's lines after the mark: in its boot the later ones, and all of other boots, which came after it."""
    return [
        _text(entry.get("MESSAGE"))
        for entry in entries
        if entry.get("_BOOT_ID") != boot or int(entry.get("__MONOTONIC_TIMESTAMP", "0")) > microseconds
    ]


def judge(since: str, lines: Sequence[str]) -> Verdict:
    xids: dict[tuple[str, int | None], list[str]] = {}
    for line in lines:
        if ANY in line:
            match = LINE.search(line)
            gpu = f"{short(match.group(1))}.0" if match else "unknown"
            xids.setdefault((gpu, int(match.group(2)) if match else None), []).append(line)
    rows = [_row(gpu, code, said, {other for at, other in xids if at == gpu}) for (gpu, code), said in xids.items()]
    found = {"since": since, "xids": rows}
    faults = [row for row in rows if row["class"] != INFO]
    if not faults:
        words = f"no Xid since the mark that asks for anything, {len(rows)} to be written down"
        return Verdict(CHECK, HEALTHY, words if rows else "no Xid since the mark", found)
    words = "; ".join(f"GPU {row['gpu']}: Xid {row['code']} ({row['meaning']}): {row['class']}" for row in faults)
    return Verdict(CHECK, UNHEALTHY, words, found)


def _row(gpu: str, code: int | None, said: Sequence[str], on_gpu: set[int | None]) -> dict[str, Any]:
    if code == RECOVERY_ACTION_CHANGED:
        # The last word counts: an action may have been asked for and done.
        match = NEW_ACTION.search(said[-1])
        action = RECOVERY_ACTIONS.get(int(match.group(1), 0)) if match else None
        named = Xid(f"recovery action changed to {action.text}", action.does) if action else None
        known = named or Xid("recovery action changed to one that is unknown here", QUARANTINE)
    else:
        known = XIDS.get(code or 0, Xid("unknown here", QUARANTINE))
    does = known.alone if known.alone and len(on_gpu) == 1 else known.does
    return {
        "gpu": gpu,
        "code": code,
        "class": does,
        "meaning": known.meaning,
        "times": len(said),
        "first": said[0][:300],
    }


def _sync() -> None:
    """Wait until what was said so far is in the journal; without its daemon nothing will be."""
    answer = tools.ask("journalctl", "--sync")
    if not answer.ok:
        raise JournalError(answer.text[:300] or "journalctl --sync failed")


def _entries(*words: str) -> list[dict[str, Any]]:
    answer = tools.ask(*JOURNAL, *words)
    if not answer.ok:
        raise JournalError(answer.text[:300] or "journalctl failed")
    try:
        return [json.loads(line) for line in answer.text.splitlines() if line]
    except ValueError as wrong:
        raise JournalError(f"journalctl's answer is no JSON: {wrong}") from None


def _text(message: str | list[int] | None) -> str:
    """A line that is not UTF-8 comes as its bytes."""
    return bytes(message).decode(errors="replace") if isinstance(message, list) else message or ""
