"""One lab fleet for all end-to-end tests, made from nothing and interrupted twice on the way up."""

import json
import os
import random
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.lab.conftest import free_port
from tools.bench_kill import Watch, killed_when

PROJECT = Path(__file__).resolve().parents[2]
STACK = "lab"
MODEL = "smollm2-135m-instruct"

# What an `up` of the lab makes on its way, first to last; behind each there is still a node to boot.
PULUMI_LANDMARKS = ("lab.json", "nodes/lab-gateway-0", "nodes/lab-chat-1", "nodes/lab-chat-0/process.json")


@dataclass
class Run:
    """What one command did: exit code, everything it printed, seconds it took."""

    rc: int
    output: str
    seconds: float

    def changed(self) -> dict[str, int]:
        """Changed tasks per node, summed over all of ansible's recaps. Empty when there was no recap."""
        changed: dict[str, int] = {}
        for host, count in re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", self.output, re.MULTILINE):
            if host != "localhost":
                changed[host] = changed.get(host, 0) + int(count)
        return changed


def run(*argv: str, timeout: float = 900, stdin: str | None = None, project: Path = PROJECT) -> Run:
    """Run one command in the project, never with a terminal, always with a deadline."""
    started = time.monotonic()
    # A file, not a pipe: a connection that ansible keeps open (ControlPersist) inherits it and would hold a pipe open.
    log = project / ".gpuyard/e2e.out"
    log.parent.mkdir(exist_ok=True)
    with log.open("w+") as out:
        done = subprocess.run(
            argv,
            cwd=project,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
            text=True,
            input=stdin or "",
        )
        out.seek(0)
        text = out.read()
    return Run(done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", text), time.monotonic() - started)


def playbook(name: str, *args: str, stack: str = STACK, timeout: float = 1200) -> Run:
    return run("ansible-playbook", "-i", f"inventories/{stack}", f"playbooks/{name}.yml", *args, timeout=timeout)


def on(node: str, command: str, timeout: float = 120) -> str:
    """Run a shell line on a node of the lab; its output. Fails the test if the line fails."""
    done = run("gpuyard", "lab", "ssh", node, "--", command, timeout=timeout)
    assert done.rc == 0, f"{command!r} on {node}: {done.output}"
    return done.output.strip()


@dataclass(frozen=True)
class OwnFleet:
    """A fleet in a project of its own, as its user has them in hand."""

    stack: str
    project: Path
    port: int

    def run(self, *argv: str, timeout: float = 900) -> Run:
        done = run("bash", "-c", '. ./activate && exec "$@"', "-", *argv, timeout=timeout, project=self.project)
        print(f"{' '.join(argv)[:100]}: {done.rc} after {done.seconds:.0f} s")
        return done

    def done(self, *argv: str, timeout: float = 900) -> Run:
        ran = self.run(*argv, timeout=timeout)
        assert ran.rc == 0, ran.output
        return ran

    def on(self, node: str, line: str) -> str:
        return self.done("gpuyard", "lab", "ssh", "--stack", self.stack, node, "--", line).output

    def playbook(self, name: str, *words: str) -> Run:
        return self.run("ansible-playbook", "-i", f"inventories/{self.stack}", f"playbooks/{name}.yml", *words)

    def played(self, name: str, *words: str) -> Run:
        ran = self.playbook(name, *words)
        assert ran.rc == 0, ran.output
        return ran

    def write(self, spec: Path, changes: Mapping[str, str], more: str = "") -> None:
        """A spec of the project's, with other words and with its own name and port."""
        text = spec.read_text()
        own = {f"name: {spec.stem}\n": f"name: {self.stack}\n"}
        for old, new in {**own, **changes}.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        text, ports = re.subn(r"(?m)^  port: [0-9]+$", f"  port: {self.port}", text)
        assert ports == 1
        (self.project / f"fleets/{self.stack}.yaml").write_text(text + more)

    def lock(self, *words: str) -> dict[str, str]:
        """The reason of each move, by what moves."""
        told = json.loads(self.done("gpuyard", "lock", f"fleets/{self.stack}.yaml", "--json", *words).output)
        assert told["changed"]
        return {f"{move['what']}: {move['before']} -> {move['after']}": move["why"] for move in told["moves"]}


@contextmanager
def own_fleet(stack: str) -> Generator[OwnFleet]:
    """A project with the product's files and a state of its own; its lab goes with it."""
    project = PROJECT / ".gpuyard" / f"{stack}-{secrets.token_hex(3)}"
    (project / "fleets").mkdir(parents=True)
    # Who looks for the project where a file really lies has to find this one there.
    for folder in ("stacks", "tools", "collections"):
        shutil.copytree(PROJECT / folder, project / folder, symlinks=True, ignore=shutil.ignore_patterns("config"))
    shutil.copytree(PROJECT / "inventories/lab", project / f"inventories/{stack}")
    (project / f"inventories/{stack}/fleet.pulumi.yml").write_text(f"plugin: gpuyard.fleet.pulumi\nstack: {stack}\n")
    for part in (".venv", "Pulumi.yaml", "activate", "ansible.cfg", "galaxy.yml", "meta", "playbooks", "plugins"):
        (project / part).symlink_to(PROJECT / part)
    for part in ("requirements", "roles", "src"):
        (project / part).symlink_to(PROJECT / part)
    made = OwnFleet(stack, project, free_port())
    try:
        made.done("tools/setup", "state", "pulumi")
        yield made
    finally:
        assert made.run("gpuyard", "lab", "down", "--stack", stack).rc == 0
        shutil.rmtree(project)


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
