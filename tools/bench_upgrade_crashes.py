"""Break off a driver upgrade in every state, in every way, and see that the same command comes to the same end.

The fleet is made for it: three GPU nodes with simulated engines, and load (`gpuyard bench load`) all the while. One
node goes to the other driver, by upgrade_driver.yml and by rollback_driver.yml in turn; when it comes to a state, or
some seconds later, something happens: the operator is killed, the node loses its power, the node is cut off, or the
gateway is restarted. Then the same command is run until it comes to its end. A case is as expected if the node has
the driver that was asked for (or, broken off on its way home, the one from before), its packages were put on once,
every server is up, and no request was lost where the operator alone died: who is served by a node or a gateway that
loses its power is not to be helped.

Usage: python tools/bench_upgrade_crashes.py [--sample N] [--skip N] [--seed N]
Exit code 0 only if every case ends as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuyard.lab.own_fleet import LOST, CommandError, OwnFleet, load, own_fleet, wait
from tools.bench_upgrade import NEW, OLD, QUICK, ROLLBACK, UPGRADE, lock, nodes_of
from tools.project import PROJECT

STATES = (
    "drain-required",
    "driver-install-required",
    "validation-required",
    "uncordon-required",
    "soak-required",
    "rollback-required",
)
KILLED, POWER, CUT_OFF, GATEWAY = "operator killed", "node's power cut", "node cut off", "gateway restarted"
EVENTS = (KILLED, POWER, CUT_OFF, GATEWAY)
INSIDE_SECONDS = (1.0, 8.0)
"""How long after a state began it is broken off, where that is not at once."""
AWAY_SECONDS = 15
"""How long power or network is away."""
TRIES = 3


@dataclass(frozen=True)
class Case:
    state: str
    event: str
    delay: float
    """Seconds since the state began."""

    @property
    def name(self) -> str:
        return f"{self.event} {self.delay:.0f} s into {self.state}"


@dataclass(frozen=True)
class Ended:
    case: Case
    against: tuple[str, ...]
    """What speaks against it; nothing where it is as expected."""
    tries: int
    """How often the same command was run after it was broken off."""
    told: dict[str, Any]

    @property
    def lost(self) -> int:
        return sum(self.told[name] for name in LOST)


def cases(dice: random.Random) -> list[Case]:
    found = [
        Case(state, event, delay)
        for state in STATES
        for event in EVENTS
        for delay in (0.0, dice.uniform(*INSIDE_SECONDS))
    ]
    dice.shuffle(found)
    return found


class Bench:
    """One node that goes to and fro."""

    def __init__(self, own: OwnFleet) -> None:
        self.own = own
        self.node = nodes_of(own)[0]
        self.gateway = f"{own.stack}-gateway-0"
        self.has = OLD

    def lab(self, verb: str, *words: str) -> None:
        self.own.done("gpuyard", "lab", verb, "--stack", self.own.stack, *words)

    def note(self) -> dict[str, Any]:
        return {"state": "", "reason": "", **self.own.note(self.node)}

    def line(self) -> tuple[str, ...]:
        playbook = (UPGRADE if self.has == OLD else ROLLBACK)[1]
        return ("ansible-playbook", "-i", f"inventories/{self.own.stack}", playbook, "--limit", self.node, *QUICK)

    def walk(self, case: Case) -> Ended:
        before, after = self.has, NEW if self.has == OLD else OLD
        line = self.line()
        home = case.state == "rollback-required"
        if home:
            # Packages that are kept know of no fault of the repository's, so they are fetched anew.
            self.own.on(self.node, f"rm -rf /var/lib/gpuyard/packages/{after}; apt-get clean")
            self.lab("break", self.node, "postinst-fails")
        expected = before if home else after
        mark = self.own.on(self.node, "date +%s").strip()
        known = self.own.runs()
        tries = 0
        with load(self.own) as told:
            operator = subprocess.Popen(
                self.own.words(*line),
                cwd=self.own.project,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                wait(
                    case.state, lambda: self.own.came(self.node, case.state, known) or operator.poll() is not None, 400
                )
                came = operator.poll() is None
                time.sleep(case.delay)
                self.happens(case.event, operator)
                with suppress(subprocess.TimeoutExpired):
                    operator.wait(timeout=600)
            finally:
                if operator.poll() is None:
                    os.killpg(operator.pid, signal.SIGKILL)
                    operator.wait()
            if home:
                self.lab("mend", self.node, "postinst-fails")
            while self.note()["state"] not in ("upgrade-done", "rollback-done") and tries < TRIES:
                tries += 1
                self.own.run(*line)
            with suppress(CommandError):
                wait("every server to be up", self.all_up, 120)
        against = self.against(expected, mark, came, told, case)
        self.has = self.loaded()
        return Ended(case, tuple(against), tries, told)

    def happens(self, event: str, operator: subprocess.Popen[bytes]) -> None:
        if event == KILLED:
            with suppress(ProcessLookupError):
                os.killpg(operator.pid, signal.SIGKILL)
        elif event == GATEWAY:
            self.own.on(self.gateway, "systemctl restart haproxy")
        else:
            fault = "power-cut" if event == POWER else "partition"
            self.lab("break", self.node, fault)
            time.sleep(AWAY_SECONDS)
            self.lab("mend", self.node, fault)

    def loaded(self) -> str:
        return self.own.on(self.node, "modinfo -F version nvidia").strip()

    def all_up(self) -> bool:
        status = json.loads(self.own.asked("gpuyard", "lab", "status", "--stack", self.own.stack, "--json").output)
        return all(row["gateway"] == "UP" for row in status if row["role"] == "gpu")

    def against(self, expected: str, mark: str, came: bool, told: dict[str, Any], case: Case) -> list[str]:
        found: list[str] = []
        note = self.note()
        rest = "rollback-done" if case.state == "rollback-required" else "upgrade-done"
        if not came:
            found.append("it ended before it came to that state")
        if note["state"] != rest:
            found.append(f"it rests at {note['state']}, not at {rest}: {note.get('reason', '')[:80]}")
        asked = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        versions = {self.loaded(), *self.own.on(self.node, asked).split()}
        if versions != {expected}:
            found.append(f"it has {', '.join(sorted(versions))}, not {expected}")
        puts = self.own.on(self.node, INSTALLED.format(mark=mark)).split()
        twice = [version for version, times in Counter(puts).items() if times > 1]
        if twice:
            found.append(f"put on more than once: {', '.join(twice)}")
        if not self.all_up():
            found.append("not every server is up")
        if case.event == KILLED and not told["lossless"]:
            found.append("requests were lost")
        return found


# Versions of one package that dpkg has put on since a moment.
INSTALLED = (
    'awk -v mark={mark} \'$3 == "status" && $4 == "installed" && $5 ~ /^nvidia-driver-cuda:/ {{'
    'gsub("-", " ", $1); gsub(":", " ", $2); if (mktime($1 " " $2) >= mark) print $6}}\' /var/log/dpkg.log'
)


def table_of(found: Sequence[Ended]) -> Table:
    table = Table(title="one node's driver changed, and broken off", title_justify="left")
    for column in ("what happened", "tried again", "as expected", "requests", "lost", "against it"):
        table.add_column(column, overflow="fold")
    for one in found:
        good = "no" if one.against else "yes"
        counts = (str(one.told["requests"]), str(one.lost))
        table.add_row(one.case.name, str(one.tries), good, *counts, "; ".join(one.against))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many cases, drawn at random; 0: all")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="not the first N, which this seed has tried")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311  (dice, not a secret)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    tried = cases(random.Random(options.seed))[options.skip :][: options.sample or None]  # noqa: S311
    found: list[Ended] = []
    with own_fleet("broken", PROJECT) as own:
        lock(own, OLD)
        own.done("gpuyard", "lab", "up", "--stack", own.stack)
        lock(own, NEW)
        bench = Bench(own)
        for case in tried:
            found.append(bench.walk(case))
            print(f"{case.name}: {'; '.join(found[-1].against) or 'as expected'}", flush=True)
    Console(width=160).print(table_of(found))
    figures = {
        "cases": len(found),
        "as_expected": sum(not one.against for one in found),
        "again": sum(one.tries for one in found),
        "requests": sum(one.told["requests"] for one in found),
        "lost_operator_killed": sum(one.lost for one in found if one.case.event == KILLED),
        "lost": sum(one.lost for one in found),
        "skipped": options.skip,
        "seed": options.seed,
    }
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return 1 if any(one.against for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
