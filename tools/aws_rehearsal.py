"""Rehearse the fleets of AWS on an emulated account: the real engine, the real SDK, moto in the place of AWS.

    python tools/aws_rehearsal.py [FLEET...]

Each fleet is brought up in an account of its own; the account is read back and compared, card by card, with EC2's table
of its machines; a second `up` follows, the first pool grows by two nodes and shrinks to one fewer than it had, and the
fleet is destroyed. What takes something away is tried without consent first, and has to be held. Prints a row for each
fleet, and each mismatch. The last line has the figures as name=value. Exit code 1 if there was a mismatch, a change
that nobody asked for or consented to, or something left.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.emulated_aws.fleet import FLEETS, EmulatedFleet, emulated_fleet, moto_server
from tests.emulated_aws.readback import Readback


@dataclass
class Rehearsed:
    """What came of one fleet."""

    name: str
    resources: int = 0
    machines: int = 0
    cards: int = 0
    second_up_changes: int = 0
    scaled: int = 0
    scaled_touched_others: int = 0
    held: int = 0
    left: int = 0
    up_seconds: float = 0
    wrong: list[str] = field(default_factory=list[str])


def rehearse(name: str, folder: Path) -> Rehearsed:
    """The life of one fleet."""
    found = Rehearsed(name)
    with moto_server(folder / f"{name}-moto") as endpoint:
        fleet = emulated_fleet(folder, name, endpoint)
        fleet.up()
        found.up_seconds = fleet.seconds["up"][0]
        found.resources = len(fleet.state())
        look(fleet, found)
        found.second_up_changes = len(fleet.up())
        pool = fleet.spec().pools[0]
        scale(fleet, pool.name, (pool.nodes, pool.nodes + 2, pool.nodes - 1), found)
        hold(fleet, "destroy", found)
        fleet.give_up()
        fleet.done("destroy", "--yes", "--skip-preview")
        left = [f"{row['urn']} is left in the state" for row in fleet.state()]
        left += [f"{what} is left in the account" for what in fleet.left()]
        found.left, found.wrong = len(left), found.wrong + left
    return found


def look(fleet: EmulatedFleet, found: Rehearsed) -> None:
    """Read the account back."""
    readback = Readback(fleet)
    found.wrong += readback.mismatches()
    found.machines = found.machines or readback.machines
    found.cards += readback.cards


def scale(fleet: EmulatedFleet, pool: str, sizes: tuple[int, ...], found: Rehearsed) -> None:
    """The pool in one size after the other; what is touched besides the nodes that come or go is counted."""
    for before, after in itertools.pairwise(sizes):
        act = "create" if after > before else "delete"
        numbers = range(min(before, after), max(before, after))
        expected = {(act, f"{fleet.name}-{pool}-{number}") for number in numbers}
        fleet.resize(pool, after)
        if act == "delete":
            hold(fleet, "up", found)
            fleet.give_up(*(name for _, name in expected))
        acts = set(fleet.up())
        found.scaled += len(acts & expected)
        found.scaled_touched_others += len(acts ^ expected)
        found.wrong += [f"{before} to {after} nodes: {act} {name}" for act, name in sorted(acts ^ expected)]
        look(fleet, found)


def hold(fleet: EmulatedFleet, act: str, found: Rehearsed) -> None:
    """What nobody consented to is refused, and nothing is done."""
    fleet.forget()
    refused = fleet.pulumi(act, "--yes", "--skip-preview")
    said = "pulumi state unprotect" in refused.stdout and refused.returncode != 0
    found.held += said and not fleet.acts()
    found.wrong += [] if said else [f"`{act}` without consent was not refused"]
    found.wrong += [f"`{act}` without consent: {what} {name}" for what, name in fleet.acts()]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("fleets", nargs="*", metavar="FLEET", help=f"default: {' '.join(FLEETS)}")
    names = options.parse_args().fleets or FLEETS
    with tempfile.TemporaryDirectory(prefix="aws-rehearsal-") as folder:
        rows = [rehearse(name, Path(folder)) for name in names]
    table = Table(
        "fleet", "machines", "resources", "per machine", "cards", "up", "second up", "scaled", "others", "held", "left"
    )
    for row in rows:
        cells = (
            row.machines,
            row.resources,
            f"{row.resources / row.machines:.1f}",
            row.cards,
            f"{row.up_seconds:.0f} s",
        )
        then = (row.second_up_changes, row.scaled, row.scaled_touched_others, row.held, row.left)
        table.add_row(row.name, *map(str, cells), *map(str, then))
    Console(width=120).print(table)
    wrong = [f"{row.name}: {what}" for row in rows for what in row.wrong]
    print("\n".join(wrong), end="\n" if wrong else "")
    figures = {
        "fleets": len(rows),
        "machines": sum(row.machines for row in rows),
        "resources": sum(row.resources for row in rows),
        "cards": sum(row.cards for row in rows),
        "mismatches": len(wrong),
        "second_up_changes": sum(row.second_up_changes for row in rows),
        "scaled": sum(row.scaled for row in rows),
        "scaled_touched_others": sum(row.scaled_touched_others for row in rows),
        "held": sum(row.held for row in rows),
        "left": sum(row.left for row in rows),
    }
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return 1 if wrong or figures["second_up_changes"] else 0


if __name__ == "__main__":
    sys.exit(main())
