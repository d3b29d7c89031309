"""Bring a serving fleet to another driver and back, again and again under load, and print what was lost; beside it the
play that is written without gpuyard (tools/naive_upgrade.yml), on the same fleet, under the same load.

The fleet is made for it, on the older one of two drivers: three GPU nodes with simulated engines, or with --real two
with real ones, which start and compile in their own time. The load is short, long and streamed requests (`gpuyard
bench load`), begun before the first node is touched and ended after the last one is back; the client tries nothing
twice. Retries are those of the gateway, of which a user sees nothing. A node is out of rotation while the gateway has
it as anything but UP, as asked five times a second: without a drain, that begins some seconds after the engine has
gone. Downloads are those of packages by a node that is out of rotation. `wall` is the time from the first node's
leaving to the last one's return, less the soak that was asked for, as a multiple of what the nodes were out of
rotation, one after the other: what is above 1 is ours. A reboot and a fabric manager's start cost nothing here.

The naive play stops the fleet's own units, in which an engine lets its requests end (`drain_seconds`). What it loses is
what comes to an engine that is ending; with vLLM's own default, which lets none end, it would lose more.

Usage: python tools/bench_upgrade.py [--runs 3] [--naive 1] [--rate 20] [--compile 435] [--start 60] [--seed N]
       python tools/bench_upgrade.py --real [--runs 3] [--rate 0.5]
Exit code 0 only if upgrades and rollbacks lost nothing, and the play without a drain lost something.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuyard.lab.own_fleet import LOST, CommandError, OwnFleet, Run, load, own_fleet, wait
from gpuyard.lab.packages import dkms_source
from tools.project import PROJECT

BUILDS = dkms_source.COMPILED
OLD, NEW = "580.105.08", "580.126.20"

UPGRADE = ("upgrade", "playbooks/operate/upgrade_driver.yml")
ROLLBACK = ("rollback", "playbooks/operate/rollback_driver.yml")
NAIVE = ("naive", "tools/naive_upgrade.yml")
# Nobody is asked, and the canary is looked at twice.
SOAK = 5
QUICK = ("-e", "upgrade_confirm=false", "-e", f"upgrade_soak_seconds={SOAK}", "-e", f"upgrade_soak_every={SOAK}")

# Runs on the gateway until its input ends: a line as often as it looks.
WATCH = """
import csv, json, select, sys, time
sys.path.insert(0, "/usr/local/lib/gpuyard")
import gateway_state as gateway
while not select.select([sys.stdin], [], [], 0.2)[0]:
    rows = csv.DictReader(gateway.statistics(gateway.MASTER)[0].lstrip("# ").splitlines())
    rows = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")]
    seen = {"at": time.time(), "status": {row["svname"]: row["status"] for row in rows}}
    print(json.dumps({**seen, "retries": sum(int(row["wretr"]) for row in rows)}), flush=True)
"""


@dataclass(frozen=True)
class Sample:
    """The gateway at one moment."""

    at: float
    """Seconds since 1970."""
    status: Mapping[str, str]
    """HAProxy's word for each node."""
    retries: int
    """Since the gateway started."""

    def up(self) -> bool:
        return all(word.startswith("UP") for word in self.status.values())


Spans = Mapping[str, Sequence[tuple[float, float]]]
"""Of each node, from when until when: seconds since 1970."""


@dataclass(frozen=True)
class Walk:
    """One play over the fleet, and what became of the requests of that time."""

    kind: str
    run: Run
    told: Mapping[str, Any]
    """The report of `gpuyard bench load`."""
    retries: int
    outages: Mapping[str, float]
    """Seconds out of rotation, of each node."""
    downloaded: int
    """Bytes of packages that nodes fetched while they were out of rotation."""
    compiled: float
    """Seconds of processor time that nodes spent on modules while they were out of rotation."""
    wall: float
    """Seconds from when the first node was out until the last one was back, less the soak that was asked for."""

    @property
    def longest(self) -> float:
        return max(self.outages.values())

    @property
    def overhead(self) -> float:
        """The whole play's time, as a multiple of what its nodes were out, one after the other."""
        return self.run.seconds / sum(self.outages.values())


def lock(own: OwnFleet, driver: str, changes: Mapping[str, str] | None = None, spec: str = "drill") -> None:
    """Ask for another driver, or for something else, and lock it."""
    # What is shown here outlives the branches that it is shown with.
    until = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    accept = f'accept: [{{rule: COMPAT-BRANCH-END, reason: Shown in the lab., until: "{until}"}}]\n'
    own.write(PROJECT / f"fleets/{spec}.yaml", {'branch: "580"': f"version: {driver}", **(changes or {})}, accept)
    own.lock()


def nodes_of(own: OwnFleet) -> list[str]:
    addresses = json.loads((own.project / f".gpuyard/labs/{own.stack}/addresses.json").read_text())
    return sorted(name for name in addresses if name.startswith(f"{own.stack}-chat-"))


def drivers(own: OwnFleet) -> list[str]:
    """The driver that each node has loaded."""
    line = "grep -o '[0-9]\\{3\\}[.][0-9.]*' /proc/driver/nvidia/version | head -1"
    return [own.on(node, line).strip() for node in nodes_of(own)]


@contextmanager
def watched(own: OwnFleet) -> Generator[Callable[[], list[Sample]]]:
    """What the gateway thinks of its nodes: all that was seen since the block began, whenever asked."""
    line = f"python3 -B -c {shlex.quote(WATCH)}"
    with tempfile.NamedTemporaryFile("w+") as out:
        child = subprocess.Popen(
            own.words("gpuyard", "lab", "ssh", "--stack", own.stack, f"{own.stack}-gateway-0", "--", line),
            cwd=own.project,
            stdin=subprocess.PIPE,
            stdout=out,
        )

        def samples() -> list[Sample]:
            if child.poll() is not None:
                raise CommandError(f"nobody watches the gateway: ended with {child.returncode}")
            return [Sample(**json.loads(line)) for line in re.findall(r".*\n", Path(out.name).read_text())]

        try:
            yield samples
        finally:
            child.communicate(timeout=30)


def spans(samples: Iterable[Sample]) -> Spans:
    """When each node was out of rotation."""
    found: dict[str, list[tuple[float, float]]] = {}
    since: dict[str, float] = {}
    at = 0.0
    for sample in samples:
        at = sample.at
        for node, word in sample.status.items():
            found.setdefault(node, [])
            if word.startswith("UP"):
                if node in since:
                    found[node].append((since.pop(node), at))
            else:
                since.setdefault(node, at)
    for node, begun in since.items():
        found[node].append((begun, at))
    return found


def fetched(log: str, addresses: Mapping[str, str], sizes: Mapping[str, int], out: Spans) -> int:
    """Bytes of packages that nodes fetched while they were out of rotation, by the log of the lab's server.

    `addresses` by node, `sizes` by file name. The log tells whole seconds of this machine's time, rounded down.
    """
    names = {address: node for node, address in addresses.items()}
    total = 0
    for address, when, path in re.findall(r'(?m)^(\S+) - - \[(.+?)\] "GET (\S+\.deb) ', log):
        at = time.mktime(time.strptime(when, "%d/%b/%Y %H:%M:%S"))
        if any(begin < at + 1 and at <= end for begin, end in out.get(names.get(address, ""), [])):
            total += sizes[path.rsplit("/", 1)[1]]
    return total


def compiled(log: str, out: Sequence[tuple[float, float]]) -> float:
    """Seconds of processor time that a node compiled while it was out of rotation, by its own log."""
    builds = [json.loads(line) for line in log.splitlines()]
    return sum(
        one["seconds"] for one in builds if any(begin <= one["until"] and one["from"] <= end for begin, end in out)
    )


def with_a_compiler(own: OwnFleet, seconds: float) -> None:
    """From now on the nodes' packages have DKMS build their modules, and that costs so much processor time."""
    headers = "build=/lib/modules/$(uname -r)/build; mkdir -p $build/include && touch $build/.config"
    for node in nodes_of(own):
        own.on(node, f"{headers} && touch {BUILDS} && echo {seconds} >{dkms_source.COST}")


def with_slow_starts(own: OwnFleet, seconds: float) -> None:
    """From now on an engine needs so much longer until it listens, as one does that loads its weights."""
    folder = "/etc/systemd/system/vllm@.service.d"
    for node in nodes_of(own):
        words = f"[Service]\\nExecStartPre=/bin/sleep {seconds:g}\\n"
        own.on(node, f"mkdir -p {folder} && printf '{words}' >{folder}/slow-start.conf && systemctl daemon-reload")


def walk(own: OwnFleet, way: tuple[str, str], rate: float = 20, seed: int = 0, limit: str = "") -> Walk:
    """Play it under load. CommandError where it does not come to its end."""
    kind, playbook = way
    lab = own.project / f".gpuyard/labs/{own.stack}"
    words = [*(QUICK if way != NAIVE else ()), *(("--limit", limit) if limit else ())]
    if way == NAIVE:
        # What we brought to the nodes is not there without us.
        for node in nodes_of(own):
            own.on(node, "apt-get clean")
    with watched(own) as samples:
        wait("the gateway to have all nodes up", lambda: samples() != [] and samples()[-1].up())
        first = len(samples())
        with load(own, rate, seed) as told:
            run = own.done("ansible-playbook", "-i", f"inventories/{own.stack}", playbook, *words)
            wait("the gateway to have all nodes up again", lambda: samples()[-1].up())
        seen = samples()[first:]
    out = spans(seen)
    times = [time for spans_of in out.values() for span in spans_of for time in span]
    return Walk(
        kind=kind,
        run=run,
        told=told,
        retries=seen[-1].retries - seen[0].retries,
        outages={node: sum(end - begin for begin, end in out[node]) for node in nodes_of(own)},
        downloaded=fetched(
            (lab / "server.log").read_text(),
            json.loads((lab / "addresses.json").read_text()),
            {path.name: path.stat().st_size for path in (lab / "apt").glob("*.deb")},
            out,
        ),
        compiled=sum(compiled(own.on(node, f"cat {BUILDS} 2>/dev/null || true"), out[node]) for node in nodes_of(own)),
        wall=max(times) - min(times) - (0 if way == NAIVE else SOAK),
    )


WHILE_OUT = ("fetched while out, B", "compiled while out, CPU s")


def table_of(walks: Sequence[Walk]) -> Table:
    title = "short, long and streamed requests while the driver changes"
    table = Table(title=title, title_justify="left")
    for column in ("", "play", "seconds", "requests", *LOST, "retries", "longest out, s", *WHILE_OUT):
        table.add_column(column, justify="left" if column == "play" else "right")
    for number, one in enumerate(walks, start=1):
        lost = (str(one.told[name]) for name in ("requests", *LOST))
        rest = (str(one.retries), f"{one.longest:.1f}", str(one.downloaded), f"{one.compiled:.0f}")
        table.add_row(str(number), one.kind, f"{one.run.seconds:.0f}", *lost, *rest)
    table.add_section()
    for kind in dict.fromkeys(one.kind for one in walks):
        these = [one for one in walks if one.kind == kind]
        counts = (f"{statistics.median(one.told[name] for one in these):g}" for name in ("requests", *LOST))
        seconds = statistics.median(one.run.seconds for one in these)
        out = statistics.median(one.longest for one in these)
        rest = [
            statistics.median(getattr(one, name) for one in these) for name in ("retries", "downloaded", "compiled")
        ]
        last = (f"{rest[0]:g}", f"{out:.1f}", f"{rest[1]:g}", f"{rest[2]:.0f}")
        table.add_row("median", kind, f"{seconds:.0f}", *counts, *last)
    return table


def figures(walks: Sequence[Walk], seed: int) -> dict[str, float]:
    """The bench in numbers: what comes of plays with a drain first, then `naive_…`. Times are medians, in seconds;
    those out of rotation are of a node."""

    def of(these: Sequence[Walk]) -> dict[str, float]:
        counts = {name: sum(one.told[name] for one in these) for name in ("requests", *LOST)}
        return {
            **counts,
            "retries": sum(one.retries for one in these),
            "seconds": round(statistics.median(one.run.seconds for one in these), 1),
            "out_seconds": round(statistics.median(time for one in these for time in one.outages.values()), 1),
            "out_bytes": sum(one.downloaded for one in these),
            "out_compiled": round(sum(one.compiled for one in these), 1),
            "overhead": round(statistics.median(one.overhead for one in these), 2),
            "wall": round(statistics.median(one.wall / sum(one.outages.values()) for one in these), 2),
        }

    kinds = Counter(one.kind for one in walks)
    ours = of([one for one in walks if one.kind != "naive"])
    naive = of([one for one in walks if one.kind == "naive"])
    return {
        "upgrades": kinds["upgrade"],
        "rollbacks": kinds["rollback"],
        **ours,
        "naive": kinds["naive"],
        **{f"naive_{name}": value for name, value in naive.items()},
        "out_of_naive": round(ours["out_seconds"] / naive["out_seconds"], 3),
        "seed": seed,
    }


def verdict(walks: Sequence[Walk]) -> list[str]:
    """What speaks against it; nothing where all is well."""
    against = [
        f"LOST: requests were lost in {one.kind} {number}"
        for number, one in enumerate(walks, start=1)
        if one.kind != "naive" and not one.told["lossless"]
    ]
    if all(one.told["lossless"] for one in walks if one.kind == "naive"):
        against.append("EMPTY: nothing was lost without a drain either, so this load shows nothing")
    return against


def main() -> int:
    """Walk all, print a table, and a line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="so many upgrades and rollbacks")
    # A compiler makes them long.
    parser.add_argument("--naive", type=int, default=1, help="so many naive plays forth and back")
    parser.add_argument("--real", action="store_true", help="real engines on two nodes, and no injected delays")
    parser.add_argument("--rate", type=float, help="requests a second (20, of real engines 0.5)")
    # Of NVIDIA's open modules 595.45.04, measured on two cores: the kernel's part alone, as DKMS builds it.
    parser.add_argument("--compile", type=float, default=435, help="processor time that a driver's modules take, s")
    # An example of the time that an engine takes for weights of 70B on 8 GPUs; the smaller it is, the more the time of
    # our own tasks weighs.
    parser.add_argument("--start", type=float, default=60, help="seconds until an engine listens, beside its own")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311  (dice, not a secret)
    options = parser.parse_args()
    rate = options.rate or (0.5 if options.real else 20)
    spec = "lab" if options.real else "drill"
    print(f"seed {options.seed}", flush=True)
    walks: list[Walk] = []
    with own_fleet("bench", PROJECT) as own:

        def to(driver: str, way: tuple[str, str]) -> None:
            walks.append(walk(own, way, rate, options.seed + len(walks)))
            if set(found := drivers(own)) != {driver}:
                raise CommandError(f"after {way[0]} the nodes run {', '.join(found)}, and not {driver}")

        lock(own, OLD, spec=spec)
        own.done("gpuyard", "lab", "up", "--stack", own.stack)
        if not options.real:
            with_a_compiler(own, options.compile)
            with_slow_starts(own, options.start)
        # First, so that a load that shows nothing is known at once.
        for driver in (NEW, OLD) * options.naive:
            lock(own, driver, spec=spec)
            to(driver, NAIVE)
        lock(own, NEW, spec=spec)
        for _ in range(options.runs):
            to(NEW, UPGRADE)
            to(OLD, ROLLBACK)
    Console(width=140).print(table_of(walks))
    against = verdict(walks)
    print("\n".join(against), end="\n" if against else "")
    print(" ".join(f"{name}={value}" for name, value in figures(walks, options.seed).items()))
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main())
