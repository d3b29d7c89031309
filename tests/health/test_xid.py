"""The kernel's Xid lines since a mark, and the verdict on them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gpuyard.health import __main__ as program
from gpuyard.health import tools, xid
from gpuyard.health.verdict import HEALTHY, UNHEALTHY
from gpuyard.health.xid_catalog import AS_OF, CLASSES, INFO, QUARANTINE, RECOVERY_ACTIONS, XIDS
from gpuyard.lab.faults import gpus as lab

BOOT, OTHER, ANOTHER = "a" * 32, "b" * 32, "0" * 32
SINCE = f"s={'c' * 32};i=1f;b={BOOT};m=f4240;t=61;x=9"  # a second after the boot


def line(code: int, more: str = "", at: str = "PCI:0000:19:00") -> str:
    return f"NVRM: Xid ({at}): {code}{more}"


def judged(*lines: str) -> tuple[str, list[dict[str, Any]], str]:
    verdict = xid.judge(SINCE, lines)
    return verdict.state, list(verdict.found["xids"]), verdict.reason


# --- the policy ------------------------------------------------------------------------------------------------------

CLASS_OF = {
    "APP": (13, 31, 43, 68, 69, 94),
    "RESET": (46, 48, 62, 95, 109, 110, 119, 120, 140, 143, 155, 156, 158),
    "REBOOT": (61, 79),
    "FABRIC": (74, 136, 144, 145, 146, 147, 148, 149, 150),
    "RMA": (64, 157),
    "INFO": (63, 92, 121, 137),
}


@pytest.mark.parametrize(("code", "does"), [(code, does) for does, codes in CLASS_OF.items() for code in codes])
def test_an_xid_has_its_class(code: int, does: str) -> None:
    state, rows, reason = judged(line(code, ", pid=4242, name=python3"))
    assert [(row["gpu"], row["code"], row["class"]) for row in rows] == [("0000:19:00.0", code, does)]
    assert state == (HEALTHY if does == INFO else UNHEALTHY)
    assert does == INFO or f"GPU 0000:19:00.0: Xid {code} ({XIDS[code].meaning}): {does}" in reason


def test_the_catalog_is_whole() -> None:
    assert {code for codes in CLASS_OF.values() for code in codes} == set(XIDS) - {45}
    assert re.fullmatch(r"20\d\d-\d\d", AS_OF)
    for row in XIDS.values():
        assert row.meaning
        assert {row.does, row.alone or INFO} <= set(CLASSES)


@pytest.mark.parametrize("code", [0, 1, 154_000, 167, 168, 169, 170, 171, 172, 999, 9999])
def test_an_unknown_xid_is_a_reason_for_quarantine_and_for_nothing_else(code: int) -> None:
    state, rows, reason = judged(line(code))
    assert (state, rows[0]["class"]) == (UNHEALTHY, QUARANTINE)
    assert f"Xid {code} (unknown here): {QUARANTINE}" in reason


@pytest.mark.parametrize("text", ["NVRM: Xid of another shape", "NVRM: Xid (PCI:0000:19:00) 79", "NVRM: Xid (): 79"])
def test_an_xid_that_cannot_be_read_is_not_ignored(text: str) -> None:
    state, rows, _ = judged(text)
    assert (state, rows[0]["class"], rows[0]["first"]) == (UNHEALTHY, QUARANTINE, text)


@pytest.mark.parametrize(("number", "row"), RECOVERY_ACTIONS.items())
def test_a_change_of_the_recovery_action_is_judged_by_the_action(number: int, row: Any) -> None:
    changed = line(154, f", GPU recovery action changed from 0x0 (None) to {number:#x} (Some Words)")
    state, rows, _ = judged(changed)
    assert (state, rows[0]["class"]) == (UNHEALTHY if number else HEALTHY, row.does)


@pytest.mark.parametrize("more", [", GPU recovery action changed from 0x0 (None) to 0x63 (Unknown)", ""])
def test_an_action_that_nobody_knows_is_a_reason_for_quarantine(more: str) -> None:
    assert judged(line(154, more))[1][0]["class"] == QUARANTINE


def test_the_last_change_of_the_recovery_action_counts() -> None:
    asked = line(154, ", GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)")
    done = line(154, ", GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)")
    assert judged(asked, done)[0] == HEALTHY
    assert judged(done, asked)[0] == UNHEALTHY


def test_a_preemptive_cleanup_matters_where_it_comes_alone() -> None:
    alone = judged(line(45), line(45), line(13, at="PCI:0000:29:00"))
    assert {row["gpu"]: row["class"] for row in alone[1]} == {"0000:19:00.0": "FABRIC", "0000:29:00.0": "APP"}
    other_way = judged(line(13), line(45, at="PCI:0000:29:00"))
    assert {row["gpu"]: row["class"] for row in other_way[1]} == {"0000:19:00.0": "APP", "0000:29:00.0": "FABRIC"}
    assert [row["class"] for row in judged(line(45))[1]] == ["FABRIC"]
    assert [row["class"] for row in judged(line(45), line(63))[1]] == [INFO, INFO]
    assert judged(line(45), line(63))[0] == HEALTHY


# --- the kernel's lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", lab.WORDS)
def test_every_line_that_the_lab_writes_is_read(code: int) -> None:
    assert judged(line(code, f", {lab.WORDS[code]}"))[1][0]["code"] == code


@pytest.mark.parametrize(
    ("at", "gpu"),
    [
        ("PCI:0000:19:00", "0000:19:00.0"),
        ("0000:03:00", "0000:03:00.0"),
        ("PCI:0001:AF:00", "0001:af:00.0"),
        ("PCI:00000000:AF:00", "0000:af:00.0"),
        ("PCI:0000:01:00 GPU-I:05", "0000:01:00.0"),
    ],
)
def test_an_address_is_read_in_all_its_shapes(at: str, gpu: str) -> None:
    assert [(row["gpu"], row["code"]) for row in judged(line(31, at=at))[1]] == [(gpu, 31)]


def test_the_same_is_told_once_and_counted() -> None:
    _, rows, reason = judged(
        line(79, ", pid=1"),
        line(79, ", pid=2"),
        line(79),
        line(63),
        line(79, at="PCI:0000:29:00"),
        "NVRM: loading NVIDIA UNIX",
    )
    assert [(row["gpu"], row["code"], row["times"]) for row in rows] == [
        ("0000:19:00.0", 79, 3),
        ("0000:19:00.0", 63, 1),
        ("0000:29:00.0", 79, 1),
    ]
    assert rows[0]["first"] == line(79, ", pid=1")
    assert reason.count("Xid 79") == 2
    assert "63" not in reason


def test_no_xid_is_healthy() -> None:
    assert judged("NVRM: loading NVIDIA UNIX Open Kernel Module", "usb 1-1: new device") == (
        HEALTHY,
        [],
        "no Xid since the mark",
    )


# --- the mark --------------------------------------------------------------------------------------------------------


class Journal:
    """A journal of lines: boot, microseconds since it, text."""

    def __init__(self, *entries: tuple[str, int, object]) -> None:
        self.entries = [
            {"__CURSOR": f"{SINCE[:-1]}{number:x}", "_BOOT_ID": boot, "__MONOTONIC_TIMESTAMP": str(us), "MESSAGE": text}
            for number, (boot, us, text) in enumerate(entries, 1)
        ]
        self.asked: list[tuple[str, ...]] = []
        self.sync = tools.Answer(True, "")
        self.said = tools.Answer(True, "\n".join(json.dumps(entry) for entry in self.entries))
        self.first = SINCE

    def ask(self, *command: str) -> tools.Answer:
        self.asked.append(command)
        if command == ("journalctl", "--sync"):
            return self.sync
        if "--lines=1" in command:
            return tools.Answer(True, json.dumps({"__CURSOR": self.first}) if self.first else "")
        return self.said


def probed(monkeypatch: pytest.MonkeyPatch, journal: Journal, since: str = SINCE) -> Any:
    monkeypatch.setattr(tools, "ask", journal.ask)
    return xid.probe(since)


def test_what_was_said_before_the_mark_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal((BOOT, 999_999, line(79)), (BOOT, 1_000_000, line(74)), (BOOT, 1_000_001, line(13)))
    assert [row["code"] for row in probed(monkeypatch, journal).found["xids"]] == [13]


def test_what_came_after_a_reboot_counts_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal((BOOT, 2_000_000, line(119)), (OTHER, 3, line(79)), (ANOTHER, 3, line(74)))
    assert [row["code"] for row in probed(monkeypatch, journal).found["xids"]] == [119, 79, 74]


def test_no_clock_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal((BOOT, 2_000_000, line(79)))
    probed(monkeypatch, journal)
    words = {word for command in journal.asked for word in command}
    assert f"--cursor={SINCE}" in words
    assert not [word for word in words if word.startswith(("--since", "--until"))]
    assert journal.asked[0] == ("journalctl", "--sync"), "what is on its way would be missed"


def test_a_line_that_is_not_utf_8_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal((BOOT, 2_000_000, [*line(79).encode(), 0xFF]), (BOOT, 2_000_001, None))
    assert [row["code"] for row in probed(monkeypatch, journal).found["xids"]] == [79]


@pytest.mark.parametrize("first", ["", SINCE[:-1] + "8", SINCE[:-1] + "a"])
def test_a_journal_that_does_not_reach_back_to_the_mark_is_not_health(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    journal = Journal()
    journal.first = first
    verdict = probed(monkeypatch, journal)
    assert verdict.state == UNHEALTHY
    assert "does not reach back to the mark" in verdict.reason


def test_a_journal_that_does_not_answer_is_not_health(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    journal.sync = tools.Answer(False, "Failed to connect to journal")
    verdict = probed(monkeypatch, journal)
    assert verdict.state == UNHEALTHY
    assert "cannot be known: Failed to connect" in verdict.reason
    journal.sync, journal.said = tools.Answer(True, ""), tools.Answer(False, "no journal")
    assert "cannot be known: no journal" in probed(monkeypatch, journal).reason
    journal.said = tools.Answer(True, "-- Boot --")
    assert "is no JSON" in probed(monkeypatch, journal).reason


@pytest.mark.parametrize("since", ["", "yesterday", "2026-11-25 10:00:00", f"{SINCE};x=", SINCE.replace("b=a", "b=")])
def test_what_is_no_mark_is_refused(since: str) -> None:
    verdict = xid.probe(since)
    assert verdict.state == UNHEALTHY
    assert "is no mark; take one before the change" in verdict.reason


def test_a_mark_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal()
    monkeypatch.setattr(tools, "ask", journal.ask)
    assert program.main(["mark"]) == 0
    assert capsys.readouterr().out == f"{SINCE}\n"
    assert journal.asked[0] == ("journalctl", "--sync"), "what was said before would count as new"
    journal.first = ""
    with pytest.raises(SystemExit, match="there is no mark: the journal is empty"):
        program.main(["mark"])
