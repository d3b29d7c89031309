"""What the engine takes for a fleet on an emulated account, beside a bare Pulumi program of the same resources.

    python tools/bench_provision.py [--sizes 10 100 1000] [--runs 3]

Both programs make the same resources with the same inputs in the same run, one after the other, each in an empty
account of its own; the bare one is written out flat, without a spec, a list, components, hooks or look-ups. 10
resources are the first of a fleet's list, more are a whole fleet with as many nodes. Times are medians, of one run
where there are 1,000. Bytes are what the engine's processes gave the file system to write. The last line has the
figures as name=value. Exit code 1 if an `up` of ours takes more than 1.2 times as long as the bare one.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuyard.catalog import load_quotas
from gpuyard.provision import Json, Ref, Wanted, resource_name
from gpuyard.provision.aws import wanted
from gpuyard.provision.refusals import Machines
from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server

GOAL = 1.2
FLEET, POOL, SECOND = "aws-g6e", "chat", "chat-2"
POOL_NODES = 512
"""The most that a fleet's spec lets one pool have."""
SECONDS = 3600

# Our own program where a fleet is too large: everything but the handover.
CUT = """
from pathlib import Path

import pulumi
import pulumi_aws as aws

from gpuyard.plan.lock import check_lock, load_lock, lock_path
from gpuyard.provision.aws import wanted
from gpuyard.provision.refusals import Machines, refusals
from gpuyard.spec.loader import load_fleet
from stacks.components.aws import Maker

path = Path(__file__).resolve().parent.parent / "fleets/{fleet}.yaml"
fleet = load_fleet(path)
check_lock(load_lock(lock_path(path)), fleet)
machines = Machines.known()
assert not refusals(fleet, machines)
opts = pulumi.ResourceOptions(provider=aws.Provider("{fleet}-aws", region=fleet.aws.region))
Maker(fleet.name, opts, None, {{}}).make(wanted(fleet, machines)[:{size}])
"""


@dataclass(frozen=True)
class Took:
    """One command of the engine."""

    seconds: float
    cpu_seconds: float
    written: int
    """Bytes."""


def timed(fleet: EmulatedFleet, *words: str) -> Took:
    """Run a command of the engine with all that it starts."""
    began = time.monotonic()
    with (fleet.project / "engine.log").open("w") as log:
        child = subprocess.Popen(
            fleet.command(*words), cwd=fleet.project, env=fleet.environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)} failed\n{(fleet.project / 'engine.log').read_text()[-4000:]}")
    # The kernel counts blocks of 512 bytes, with those of children that were waited for.
    return Took(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_oublock * 512)


def items_of(fleet: EmulatedFleet, size: int) -> list[Wanted]:
    """The list of so many resources. The fleet of the project gets as many nodes as that takes."""
    machines = Machines.known()
    spec = fleet.spec()
    items = wanted(spec, machines)
    if size < len(items):
        return items[:size]
    more = spec.pools[0].nodes + size - len(items)
    fleet.resize(POOL, min(more, POOL_NODES))
    if more > POOL_NODES:
        written = (fleet.project / f"fleets/{fleet.name}.yaml").read_text()
        (pool,) = re.findall(rf"  - name: {POOL}\n(?:    .*\n)+", written)
        fleet.edit(pool, pool + pool.replace(f"name: {POOL}", f"name: {SECOND}"))
        # A pool has resources beside its nodes.
        fleet.resize(SECOND, POOL_NODES + size - len(wanted(fleet.spec(), machines)))
    return wanted(fleet.spec(), machines)


def bare(items: Sequence[Wanted], fleet: str, region: str) -> str:
    """The same resources as a program that somebody writes by hand."""
    lines = [
        "import pulumi",
        "import pulumi_aws as aws",
        "",
        f"provider = aws.Provider({fleet + '-aws'!r}, region={region!r})",
    ]
    for number, item in enumerate(items):
        names = {each.name: f"r{index}" for index, each in enumerate(items[:number])}
        inputs = ", ".join(f"{key}={written(value, names)}" for key, value in item.inputs.items())
        after = f", depends_on=[{', '.join(names[name] for name in item.after)}]" if item.after else ""
        keeps = f", ignore_changes={list(item.keeps)!r}" if item.keeps else ""
        opts = f"opts=pulumi.ResourceOptions(provider=provider{after}{keeps})"
        lines.append(f"r{number} = aws.{item.kind}({resource_name(item, fleet)!r}, {inputs}, {opts})")
    return "\n".join(lines) + "\n"


def written(value: Any, names: dict[str, str]) -> str:
    """A value as Python."""
    match value:
        case Ref():
            return f"{names[value.name]}.{value.attribute}"
        case Json():
            return f"pulumi.Output.json_dumps({written(dict(value.data), names)})"
        case dict():
            return "{" + ", ".join(f"{key!r}: {written(item, names)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(written(item, names) for item in value) + "]"
        case _:
            return repr(value)


def measure(folder: Path, size: int, ours: bool) -> tuple[Took, Took, int, int, float]:
    """The first `up` and one that has nothing to do; resources, bytes of the state, resources for each machine."""
    with moto_server(folder / "moto") as endpoint:
        fleet = emulated_fleet(folder, FLEET, endpoint)
        for quota in load_quotas():
            fleet.account.keep_beside("quotas", quota.code, 10**6)
        items = items_of(fleet, size)
        whole = len(items) == len(wanted(fleet.spec(), Machines.known()))
        program = fleet.project / "stacks/__main__.py"
        if not ours:
            program.write_text(bare(items, FLEET, "us-east-1"))
        elif not whole:
            program.write_text(CUT.format(fleet=FLEET, size=size))
        first, again = timed(fleet, "up", "--yes", "--skip-preview"), timed(fleet, "up", "--yes", "--skip-preview")
        state = fleet.state()
        kept = sum(path.stat().st_size for path in (fleet.project / "backend").rglob(f"stacks/**/{FLEET}.json"))
        machines = len(fleet.instances())
        return first, again, len(state), kept, len(state) / machines if machines else 0


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    options.add_argument("--runs", type=int, default=3)
    args = options.parse_args()
    figures: dict[str, float] = {}
    columns = ("resources", "program", "up", "CPU", "written", "state", "no-op up", "CPU", "written", "per machine")
    table = Table(*columns)
    for size in args.sizes:
        found: dict[bool, list[tuple[Took, Took, int, int, float]]] = {True: [], False: []}
        for _ in range(args.runs if size < 1000 else 1):
            for ours in (True, False):
                with tempfile.TemporaryDirectory(prefix="bench-provision-") as folder:
                    found[ours].append(measure(Path(folder), size, ours))
        middle = {ours: [median([row[act] for row in rows]) for act in (0, 1)] for ours, rows in found.items()}
        for ours, name in ((True, "gpuyard"), (False, "bare")):
            (first, again), (_, _, resources, kept, each) = middle[ours], found[ours][0]
            cells = [
                resources,
                name,
                f"{first.seconds:.1f} s",
                f"{first.cpu_seconds:.1f} s",
                mb(first.written),
                mb(kept),
            ]
            cells += [
                f"{again.seconds:.1f} s",
                f"{again.cpu_seconds:.1f} s",
                mb(again.written),
                f"{each:.2f}" if each else "",
            ]
            table.add_row(*map(str, cells))
            figures[f"{name}_{size}_up_s"] = round(first.seconds, 1)
            figures[f"{name}_{size}_written_mb"] = round(first.written / 1e6, 2)
            figures[f"{name}_{size}_noop_s"] = round(again.seconds, 1)
            if ours and each:
                figures[f"resources_per_machine_{size}"] = round(each, 2)
        for key, act in (("up", 0), ("noop", 1)):
            figures[f"ratio_{size}_{key}"] = round(middle[True][act].seconds / middle[False][act].seconds, 2)
        figures[f"ratio_{size}_written"] = round(middle[True][0].written / max(middle[False][0].written, 1), 2)
    Console(width=140).print(table)
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return 1 if any(figures[f"ratio_{size}_{key}"] > GOAL for size in args.sizes for key in ("up", "noop")) else 0


def median(took: Sequence[Took]) -> Took:
    """Each figure's own."""
    written = statistics.median([row.written for row in took])
    seconds, cpu = (statistics.median([getattr(row, key) for row in took]) for key in ("seconds", "cpu_seconds"))
    return Took(seconds, cpu, int(written))


def mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
