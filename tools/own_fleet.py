"""Commands run in a project, and a fleet of the lab with a project of its own: for end-to-end tests and for benches."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


class CommandError(Exception):
    """A command that had to succeed did not; with the end of what it said."""


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
    with tempfile.TemporaryFile("w+") as out:
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


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclass(frozen=True)
class OwnFleet:
    """A fleet in a project of its own, as its user has them in hand."""

    stack: str
    project: Path
    port: int

    def words(self, *argv: str) -> list[str]:
        """The command line that runs a command as the project's user does."""
        return ["bash", "-c", '. ./activate && exec "$@"', "-", *argv]

    def run(self, *argv: str, timeout: float = 900) -> Run:
        done = run(*self.words(*argv), timeout=timeout, project=self.project)
        print(f"{' '.join(argv)[:100]}: {done.rc} after {done.seconds:.0f} s", flush=True)
        return done

    def done(self, *argv: str, timeout: float = 900) -> Run:
        ran = self.run(*argv, timeout=timeout)
        if ran.rc:
            raise CommandError(f"`{' '.join(argv)}` ended with {ran.rc}:\n{ran.output}")
        return ran

    def on(self, node: str, line: str) -> str:
        return self.done("gpuyard", "lab", "ssh", "--stack", self.stack, node, "--", line).output

    def playbook(self, name: str, *words: str) -> Run:
        return self.run("ansible-playbook", "-i", f"inventories/{self.stack}", f"playbooks/{name}.yml", *words)

    def played(self, name: str, *words: str) -> Run:
        ran = self.playbook(name, *words)
        if ran.rc:
            raise CommandError(f"{name}.yml ended with {ran.rc}:\n{ran.output}")
        return ran

    def write(self, spec: Path, changes: Mapping[str, str], more: str = "") -> None:
        """A spec of the project's, with other words and with its own name and port. ValueError for a word that is not
        there exactly once."""
        text = spec.read_text()
        own = {f"name: {spec.stem}\n": f"name: {self.stack}\n"}
        for old, new in {**own, **changes}.items():
            if text.count(old) != 1:
                raise ValueError(f"{old!r} is {text.count(old)} times in {spec}")
            text = text.replace(old, new)
        text, ports = re.subn(r"(?m)^  port: [0-9]+$", f"  port: {self.port}", text)
        if ports != 1:
            raise ValueError(f"{spec} has {ports} ports of a gateway")
        (self.project / f"fleets/{self.stack}.yaml").write_text(text + more)

    def lock(self, *words: str) -> dict[str, str]:
        """The reason of each move, by what moves."""
        told = json.loads(self.done("gpuyard", "lock", f"fleets/{self.stack}.yaml", "--json", *words).output)
        if not told["changed"]:
            raise CommandError(f"the lock of {self.stack} is as it was")
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
        # What a lab that does not go leaves is needed to see why.
        made.done("gpuyard", "lab", "down", "--stack", stack)
        shutil.rmtree(project)
