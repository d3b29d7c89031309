"""One lab fleet for all end-to-end tests, made from nothing and interrupted twice on the way up."""

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from gpuyard.lab.own_fleet import Run
from tools.bench_kill import Watch, killed_when
from tools.project import PROJECT, run

STACK = "lab"
MODEL = "smollm2-135m-instruct"

# What an `up` of the lab makes on its way, first to last; behind each there is still a node to boot.
PULUMI_LANDMARKS = ("lab.json", "nodes/lab-gateway-0", "nodes/lab-chat-1", "nodes/lab-chat-0/process.json")


def playbook(name: str, *args: str, stack: str = STACK, timeout: float = 1200) -> Run:
    return run("ansible-playbook", "-i", f"inventories/{stack}", f"playbooks/{name}.yml", *args, timeout=timeout)


def on(node: str, command: str, timeout: float = 120) -> str:
    """Run a shell line on a node of the lab; its output. Fails the test if the line fails."""
    done = run("gpuyard", "lab", "ssh", node, "--", command, timeout=timeout)
    assert done.rc == 0, f"{command!r} on {node}: {done.output}"
    return done.output.strip()


@dataclass
class Fleet:
    """The lab fleet, and what was seen while it came up."""

    seed: int
    clean_check: Run
    up: Run
    interrupted: dict[str, bool] = field(default_factory=dict[str, bool])


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Down, then up: `pulumi up` killed in the middle, a check on clean nodes, a converge killed in the middle,
    then `gpuyard lab up`, which has to heal all that. The seed is printed so that a failure can be had again."""
    assert shutil.which("pulumi"), "source ./activate first"
    seed = int(os.environ.get("GPUYARD_SEED", random.randrange(10**6)))  # noqa: S311  (a dice roll, not a secret)
    dice = random.Random(seed)  # noqa: S311
    print(f"GPUYARD_SEED={seed}")

    assert run("gpuyard", "lab", "down").rc == 0
    assert run("pulumi", "stack", "select", "--create", STACK).rc == 0
    # At something it did, not after a time: how long an `up` takes is the machine's affair.
    landmark = PROJECT / f".gpuyard/labs/{STACK}" / dice.choice(PULUMI_LANDMARKS)
    interrupted = {
        "pulumi up": killed_when(landmark.exists, "pulumi", "up", "--stack", STACK, "--yes", "--skip-preview")
    }
    # A killed `pulumi up` leaves its lock behind; this is pulumi's own word for taking it away.
    run("pulumi", "cancel", "--stack", STACK, "--yes")
    provision = run("pulumi", "up", "--stack", STACK, "--yes", "--skip-preview")
    assert provision.rc == 0, provision.output

    clean_check = playbook("site", "--check", "--diff")
    watch, task = Watch(), dice.randint(5, 60)
    site = ("ansible-playbook", "-i", f"inventories/{STACK}", "playbooks/site.yml")
    interrupted["site.yml"] = killed_when(lambda: watch.look() >= task, *site, log=Watch.log)
    up = run("gpuyard", "lab", "up", timeout=1800)
    yield Fleet(seed, clean_check, up, interrupted)
    if not os.environ.get("GPUYARD_KEEP_LAB"):
        assert run("gpuyard", "lab", "down").rc == 0
