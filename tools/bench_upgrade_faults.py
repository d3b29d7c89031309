"""Break a node while its driver is changed under load, one fault after the other, and print how each ends.

The fleet is made for it: three GPU nodes with simulated engines. One node is upgraded, the fault comes at the moment
that its row names, and the load (`gpuyard bench load`) runs all the while. A row is as expected only if it ends as it
says and no request is lost. Seconds to detection are those from the fault, or from
the beginning of the playbook where the fault was there before, to the refusal or to the record's `rollback-required`;
seconds to recovery, to the node's next state of rest.

Usage: python tools/bench_upgrade_faults.py [--only FAULT...] [--seed N]
Exit code 0 only if every row ends as expected.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuyard.lab.faults.table import FAULTS
from gpuyard.lab.own_fleet import LOST, CommandError, OwnFleet, load, own_fleet, wait
from tools.bench_upgrade import NEW, OLD, QUICK, UPGRADE, lock, nodes_of
from tools.project import PROJECT

REFUSED, ROLLED_BACK, QUARANTINED, RESUMED = "refused", "rolled back", "quarantined", "resumed"
RULE = re.compile(r"\b(APT|DRIVER|UPGRADE)-[A-Z-]+: ")
REST = {ROLLED_BACK: "rollback-done", QUARANTINED: "rollback-failed", RESUMED: "upgrade-done"}


@dataclass(frozen=True)
class Row:
    """A fault, when it comes and goes, and how the upgrade is to end."""

    fault: str
    parameters: tuple[str, ...]
    at: str
    """The state of the node in which it comes; "" before the upgrade."""
    until: str
    """The state in which it is mended; "" after all. What the new driver does wrong goes with it."""
    end: str
    fresh: bool = False
    """Whether the node has none of the new driver's packages yet."""
    sooner: str | None = None
    """How else it ends, where the fault is faster than what it is to break."""

    @property
    def name(self) -> str:
        return " ".join((self.fault, *self.parameters))


BACK = "rollback-required"
INSTALL, PROVE, SOAK = "driver-install-required", "validation-required", "soak-required"
ROWS = (
    # What a look before finds: no node is drained. What the repository breaks reaches only a node that has not fetched.
    Row("module-in-use", (), "", "", REFUSED),
    Row("apt-lock", (), "", "", REFUSED),
    Row("dpkg-interrupted", (), "", "", REFUSED),
    Row("disk-full", ("path=/var",), "", "", REFUSED, fresh=True),
    Row("read-only", ("path=/etc",), "", "", REFUSED),
    Row("version-missing", (f"version={NEW}-1",), "", "", REFUSED, fresh=True),
    Row("version-missing", (f"version={NEW}-1", "package=libnvidia-ml1"), "", "", REFUSED, fresh=True),
    Row("repository-key-rotated", (), "", "", REFUSED, fresh=True),
    Row("hash-sum-mismatch", (), "", "", REFUSED, fresh=True),
    Row("index-stale", (), "", "", REFUSED, fresh=True),
    Row("repository-second", (), "", "", REFUSED, fresh=True),
    Row("signed-by-conflict", (), "", "", REFUSED, fresh=True),
    Row("driver-library-newer", (), "", "", REFUSED),
    # Of the new driver: gone with it.
    Row("dkms-build-fails", (f"version={NEW}",), "", "", ROLLED_BACK, fresh=True),
    Row("postinst-fails", (), "", "", ROLLED_BACK, fresh=True),
    Row("postinst-hangs", (), "", BACK, ROLLED_BACK, fresh=True),
    Row("modprobe-hangs", (), INSTALL, BACK, ROLLED_BACK),
    Row("secure-boot", (), INSTALL, BACK, ROLLED_BACK),
    Row("gpu-not-supported", (), INSTALL, BACK, ROLLED_BACK),
    Row("gpu-missing", (), INSTALL, BACK, ROLLED_BACK),
    Row("gpu-init-fails", (), INSTALL, BACK, ROLLED_BACK),
    Row("nvml-hangs", (), INSTALL, BACK, ROLLED_BACK),
    Row("nouveau", (), INSTALL, BACK, ROLLED_BACK),
    Row("fabricmanager-mismatch", (), INSTALL, BACK, ROLLED_BACK),
    Row("fabricmanager-dead", (), PROVE, BACK, ROLLED_BACK),
    Row("gpu-lost", (), PROVE, BACK, ROLLED_BACK),
    Row("devices-gone", (), PROVE, BACK, ROLLED_BACK),
    Row("ecc", (), PROVE, BACK, ROLLED_BACK),
    Row("pcie-narrow", (), INSTALL, BACK, ROLLED_BACK),
    Row("engine-crash-loop", (), INSTALL, BACK, ROLLED_BACK),
    Row("engine-cuda-error", (), INSTALL, BACK, ROLLED_BACK),
    Row("engine-hangs", (), PROVE, BACK, ROLLED_BACK),
    Row("engine-stopped", (), PROVE, BACK, ROLLED_BACK),
    Row("engine-wrong-tokens", ("rate=0.01",), INSTALL, BACK, ROLLED_BACK),
    Row("engine-slow", ("factor=1.25",), INSTALL, BACK, ROLLED_BACK),
    Row("xid", ("code=119",), SOAK, BACK, ROLLED_BACK),
    Row("xid", ("code=48",), SOAK, BACK, ROLLED_BACK),
    Row("remap-failure", (), SOAK, BACK, ROLLED_BACK),
    Row("nvlink-down", (), SOAK, BACK, ROLLED_BACK),
    Row("recovery-action", (), SOAK, BACK, ROLLED_BACK),
    Row("gpu-hot", (), SOAK, BACK, ROLLED_BACK),
    Row("clocks-low", (), SOAK, BACK, ROLLED_BACK),
    # Of the node: there with either driver.
    Row("engine-wrong-tokens", ("rate=0.02",), INSTALL, "", QUARANTINED),
    # Where it comes before the first file is written, nothing is to be put back.
    Row("read-only", ("path=/etc",), INSTALL, "", QUARANTINED, sooner=ROLLED_BACK),
    # Of whoever changes it, of its power, or of its daemons: the change comes to its end all the same.
    # What was built before the node was emptied needs them no more.
    Row("headers-missing", (), INSTALL, "", RESUMED),
    Row("persistenced-stop-hangs", (), "", "", RESUMED),
    Row("program-killed", (), INSTALL, "", RESUMED),
    Row("program-killed", (), PROVE, "", RESUMED),
    Row("power-cut", (), INSTALL, "", RESUMED),
    Row("power-cut", (), PROVE, "", RESUMED),
    Row("partition", (), INSTALL, "", RESUMED),
)


@dataclass(frozen=True)
class Ended:
    row: Row
    end: str
    reason: str
    detected: float | None
    recovered: float | None
    told: dict[str, Any]

    @property
    def lost(self) -> int:
        return sum(self.told[name] for name in LOST)

    @property
    def good(self) -> bool:
        return self.end in (self.row.end, self.row.sooner) and self.told["lossless"]


class Bench:
    def __init__(self, own: OwnFleet) -> None:
        self.own = own
        self.node = nodes_of(own)[0]

    def lab(self, verb: str, *words: str) -> None:
        # A fault of the machine that the playbook runs on is one of no node.
        self.own.done("gpuyard", "lab", verb, "--stack", self.own.stack, *words)

    def place(self, row: Row) -> str:
        return "controller" if row.fault == "program-killed" else self.node

    def note(self) -> dict[str, Any]:
        return {"state": "", "reason": "", **self.own.note(self.node)}

    def play(self) -> subprocess.Popen[bytes]:
        words = ("ansible-playbook", "-i", f"inventories/{self.own.stack}", UPGRADE[1], "--limit", self.node, *QUICK)
        # Long enough for whatever comes to its end, short enough for a bench.
        bounds = (
            "nvidia_driver_lock_seconds=3",
            "nvidia_packages_install_seconds=60",
            "nvidia_driver_modprobe_seconds=20",
            "vllm_server_start_seconds=30",
        )
        words = (*words, *(word for bound in bounds for word in ("-e", bound)))
        log = (self.own.project / ".gpuyard/upgrade.log").open("wb")
        return subprocess.Popen(self.own.words(*words), cwd=self.own.project, stdout=log, stderr=subprocess.STDOUT)

    def tried(self, row: Row) -> Ended:
        """One row; where it could not be walked to its end, that is how it ended."""
        try:
            return self.walk(row)
        except CommandError as error:
            with suppress(CommandError):
                self.home()
            nothing = dict.fromkeys(("requests", *LOST), 0)
            return Ended(row, "broken off", str(error), None, None, {**nothing, "lossless": False})

    def home(self) -> None:
        """From wherever a row was broken off to the old driver."""
        self.tidy(REFUSED)
        self.own.playbook("operate/upgrade_driver", "--limit", self.node, *QUICK)
        state = self.note()["state"]
        self.tidy(next((end for end, rest in REST.items() if rest == state), REFUSED))

    def broken(self, row: Row, playing: subprocess.Popen[bytes]) -> None:
        """Break it as soon as there is what the fault needs: an engine, for one, that is just being started."""
        words = ("gpuyard", "lab", "break", "--stack", self.own.stack, self.place(row), row.fault, *row.parameters)
        deadline = time.monotonic() + 120
        while (ran := self.own.run(*words)).rc:
            if "FAULT-NEEDS" not in ran.output or playing.poll() is not None or time.monotonic() > deadline:
                self.own.well(words, ran)

    def walk(self, row: Row) -> Ended:
        """One row, from a fleet on the old driver to a fleet on the old driver."""
        known = self.own.runs()
        if row.fresh:
            self.own.on(self.node, f"rm -rf /var/lib/gpuyard/packages/{NEW}; apt-get clean")
        with load(self.own) as told:
            if not row.at:
                self.lab("break", self.place(row), row.fault, *row.parameters)
            began = time.time()
            playing = self.play()
            try:
                if row.at:
                    wait(row.at, lambda: self.own.came(self.node, row.at, known) or playing.poll() is not None, 300)
                    self.broken(row, playing)
                    began = time.time()
                if row.until:
                    wait(
                        row.until, lambda: self.own.came(self.node, row.until, known) or playing.poll() is not None, 600
                    )
                    self.lab("mend", self.place(row), row.fault)
                code = self.end_of(playing)
            finally:
                if playing.poll() is None:
                    playing.kill()
                    playing.wait()
            ended = time.time()
            if row.end == RESUMED:
                self.lab("mend", self.place(row), row.fault)
                if code:
                    self.own.played("operate/upgrade_driver", "--limit", self.node, *QUICK)
            note = self.note()
        states = {event["state"]: moment(event) for event in self.own.states(self.node, known)}
        end = next((name for name, state in REST.items() if state == note["state"] and state in states), "")
        if not end and "drain-required" not in states:
            end = REFUSED
        detected = states.get(BACK, ended) if end != RESUMED else None
        rested = None if end == REFUSED else states.get(REST.get(end, ""))
        self.tidy(end)
        return Ended(
            row,
            end or f"left at {note['state']}",
            self.reason() if end == REFUSED else note["reason"],
            detected - began if detected else None,
            rested - began if rested else None,
            told,
        )

    def end_of(self, playing: subprocess.Popen[bytes]) -> int:
        try:
            return playing.wait(timeout=600)
        except subprocess.TimeoutExpired:
            raise CommandError("the upgrade does not come to its end") from None

    def reason(self) -> str:
        lines = (self.own.project / ".gpuyard/upgrade.log").read_text(errors="replace").splitlines()
        return next((line.strip() for line in lines if RULE.search(line)), "")

    def tidy(self, end: str) -> None:
        for place in (self.node, "controller"):
            with suppress(CommandError):
                self.lab("mend", "--all", place)
        if end == QUARANTINED:
            self.own.on(self.node, "rm -f /var/lib/gpuyard/driver-upgrade.json")
            lock(self.own, OLD)
            self.own.played("site", "--limit", self.node)
            self.own.played("operate/undrain_node", "--limit", self.node)
            lock(self.own, NEW)
        elif end == RESUMED:
            self.own.played("operate/rollback_driver", "--limit", self.node, *QUICK)


def moment(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def table_of(found: Sequence[Ended]) -> Table:
    table = Table(title="one node upgraded under load, and broken", title_justify="left")
    columns = (
        "rows",
        "fault",
        "comes at",
        "ends",
        "as expected",
        "detected, s",
        "at rest, s",
        "requests",
        "lost",
        "why",
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for one in found:
        times = ("-" if value is None else f"{value:.0f}" for value in (one.detected, one.recovered))
        good = "yes" if one.good else "no"
        counts = str(one.told["requests"]), str(one.lost)
        rows = " ".join(FAULTS[one.row.fault].rows)
        table.add_row(rows, one.row.name, one.row.at or "before", one.end, good, *times, *counts, one.reason[:90])
    return table


def detection(found: Sequence[Ended]) -> dict[str, float]:
    """Seconds from the beginning of the playbook to its refusal, which is when nothing was touched."""
    times = [one.detected for one in found if one.end == REFUSED and one.detected is not None]
    return {"median": round(statistics.median(times), 1), "max": round(max(times), 1)} if times else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="these rows alone")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311  (dice, not a secret)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    rows = [row for row in ROWS if not options.only or row.fault in options.only]
    random.Random(options.seed).shuffle(rows)  # noqa: S311
    found: list[Ended] = []
    with own_fleet("faulty", PROJECT) as own:
        lock(own, OLD)
        own.done("gpuyard", "lab", "up", "--stack", own.stack)
        lock(own, NEW)
        bench = Bench(own)
        for row in rows:
            found.append(bench.tried(row))
            print(f"{row.name}: {found[-1].end} ({found[-1].reason[:100]})", flush=True)
    Console(width=160).print(table_of(found))
    times = sorted(one.recovered for one in found if one.recovered is not None)
    figures = {
        "faults": len(found),
        "as_expected": sum(one.good for one in found),
        **{end.replace(" ", "_"): sum(one.end == end for one in found) for end in (REFUSED, *REST)},
        "requests": sum(one.told["requests"] for one in found),
        "lost": sum(one.lost for one in found),
        **{f"refused_{name}": value for name, value in detection(found).items()},
        "recovery_median": round(statistics.median(times), 1) if times else 0,
        "recovery_max": round(max(times, default=0), 1),
        "seed": options.seed,
    }
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return 0 if all(one.good for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
