"""Kill `pulumi up` of a fleet on an emulated account at random moments, and let the next one go on.

    python tools/aws_kills.py [--kills 5] [--seed N] [--fleet aws-p5en]

Killed in turn: the first `up` of a fleet, one that adds two nodes, one that takes three away. The account takes its
time before and after it makes something, as AWS does, so that most kills fall into an operation. The whole process
group goes with SIGKILL, what AWS was asked for meanwhile is made all the same. After `pulumi cancel` the next `up` has
to come to its end, the account has to hold just what is asked for and what the state knows, and a third `up` has
nothing to do. The last line has the figures as name=value. Exit code 1 if anything was orphaned, doubled, lost or
changed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server, reset
from tests.emulated_aws.readback import Readback, astray

ACTS = ("new", "grow", "shrink")
SLOW = [
    {"act": act, "type": "", "seconds": seconds, "times": 10**9}
    for act, seconds in (("create", 0.3), ("created", 0.7), ("delete", 0.5))
]
"""How long the account takes over what. Made before it answers for longer than not: that is what can be lost."""


class Patient:
    """A fleet that is led from one act to the next. An act leaves everything to an `up`."""

    def __init__(self, name: str, folder: Path, endpoint: str) -> None:
        self.name, self.folder, self.endpoint = name, folder, endpoint
        self.number = 0
        self.fleet: EmulatedFleet

    def prepare(self, act: str) -> None:
        if act == "new":
            reset(self.endpoint)
            self.number += 1
            self.fleet = emulated_fleet(self.folder / str(self.number), self.name, self.endpoint)
            self.fleet.faults(*SLOW)
            self.pool = self.fleet.spec().pools[0]
            return
        self.fleet.resize(self.pool.name, self.pool.nodes + (2 if act == "grow" else -1))
        if act == "shrink":
            going = range(self.pool.nodes - 1, self.pool.nodes + 2)
            self.fleet.give_up(*(f"{self.fleet.name}-{self.pool.name}-{number}" for number in going))


def seconds_of(patient: Patient) -> dict[str, float]:
    """How long each act takes where nobody disturbs it."""
    found: dict[str, float] = {}
    for act in ACTS:
        patient.prepare(act)
        patient.fleet.up()
        found[act] = patient.fleet.seconds["up"][-1]
    return found


def rounds(patient: Patient, usual: dict[str, float], dice: random.Random) -> Iterator[tuple[str, list[str], int, int]]:
    """Each act with a kill in it, for ever: what it was, what was wrong afterwards, taken over, changed by a third."""
    for act in cycle(ACTS):
        patient.prepare(act)
        moment = dice.uniform(0, usual[act])
        began = time.monotonic()
        fleet = patient.fleet
        killed = fleet.killed_up(lambda due=began + moment: time.monotonic() > due)
        if not killed:
            print(f"{act:6}: had ended before second {moment:.1f}", flush=True)
            continue
        pending = len(fleet.exported().get("pending_operations") or ())
        fleet.done("cancel", "--yes")
        next_up = fleet.pulumi("up", "--yes", "--skip-preview")
        if next_up.returncode:
            yield act, [f"the next `up` failed: {next_up.stdout[-3000:]}"], 0, 0
            return
        taken = next_up.stdout.count("AWS-TAKEN-OVER")
        wrong = [*astray(fleet), *Readback(fleet).mismatches()]
        changes = fleet.up()
        wrong += [f"the third `up` had to {act} {name}" for act, name in changes]
        print(
            f"{act:6}: killed in second {moment:4.1f} with {pending:2} operations open, the next `up` took {taken} "
            f"over, {'whole' if not wrong else 'WRONG'}",
            flush=True,
        )
        yield act, wrong, taken, len(changes)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311 - dice, not a secret
    options.add_argument("--fleet", default="aws-p5en")
    args = options.parse_args()
    kills = completed = taken = changes = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="aws-kills-") as folder, moto_server(Path(folder) / "moto") as endpoint:
        patient = Patient(args.fleet, Path(folder), endpoint)
        usual = seconds_of(patient)
        told = ", ".join(f"{act} {seconds:.0f} s" for act, seconds in usual.items())
        print(f"seed {args.seed}: undisturbed {told}", flush=True)
        for _, found, its, moved in rounds(patient, usual, random.Random(args.seed)):  # noqa: S311
            kills += 1
            completed += not found
            taken += its
            changes += moved
            wrong += found
            if kills == args.kills:
                break
    print("\n".join(wrong), end="\n" if wrong else "")
    figures = {
        "kills": kills,
        "completed": completed,
        "orphaned": sum("is in no state" in what for what in wrong),
        "doubled": sum("is there" in what and "times" in what for what in wrong),
        "lost": sum("not in the account" in what for what in wrong),
        "taken_over": taken,
        "third_up_changes": changes,
        "seed": args.seed,
    }
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return 0 if completed == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
