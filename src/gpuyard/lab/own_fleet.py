"""Commands run in a project, and a fleet of the lab with a project of its own: for end-to-end tests and for benches."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuyard.upgrade import record

HANDS = ("galaxy.yml", "meta", "playbooks", "plugins", "roles")
"""What a project does to its nodes with."""
LOST = ("failed", "truncated", "duplicated", "wrong", "unended")
"""What a request may come to that is not whole, in the words of `gpuyard bench load`."""


class CommandError(Exception):
    """A command that had to succeed did not, with what it said; or something waited for did not come."""


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


def run(*argv: str, project: Path, timeout: float = 900, stdin: str | None = None) -> Run:
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
        done = self.asked(*argv, timeout=timeout)
        self.say(f"{' '.join(argv)[:100]}: {done.rc} after {done.seconds:.0f} s")
        return done

    def asked(self, *argv: str, timeout: float = 900) -> Run:
        """Run it, and say nothing of it."""
        return run(*self.words(*argv), timeout=timeout, project=self.project)

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def done(self, *argv: str, timeout: float = 900) -> Run:
        return self.well(argv, self.run(*argv, timeout=timeout))

    def on(self, node: str, line: str) -> str:
        argv = ("gpuyard", "lab", "ssh", "--stack", self.stack, node, "--", line)
        return self.well(argv, self.asked(*argv)).output

    def note(self, node: str, kind: str = "driver") -> dict[str, Any]:
        """The note of a node's last change of that kind; empty where there is none, or no answer from the node."""
        words = ("gpuyard", "lab", "ssh", "--stack", self.stack, node, "--")
        ran = self.asked(*words, f"cat /var/lib/gpuyard/{kind}-upgrade.json")
        try:
            return json.loads(ran.output) if ran.rc == 0 else {}
        except ValueError:
            return {}

    def runs(self) -> set[Path]:
        """The folders of the runs that were recorded here."""
        folder = self.project / ".gpuyard/runs"
        return set(folder.glob("*/")) if folder.is_dir() else set()

    def states(self, node: str, known: Collection[Path] = ()) -> list[dict[str, Any]]:
        """The states of a node in the newest run but those known, as recorded; none where there is no such run."""
        files = sorted(run / "record.jsonl" for run in self.runs() - set(known))
        events = record.read(files[-1]) if files and files[-1].exists() else []
        return [event for event in events if event["event"] == "state" and event["node"] == node]

    def came(self, node: str, state: str, known: Collection[Path]) -> bool:
        """Whether the newest run but those known has brought a node to a state."""
        return any(event["state"] == state for event in self.states(node, known))

    def well(self, argv: Sequence[str], ran: Run) -> Run:
        if ran.rc:
            raise CommandError(f"`{' '.join(argv)}` ended with {ran.rc}:\n{ran.output}")
        return ran

    def take_hands(self, of: Path) -> None:
        """Play with the roles and playbooks of another project from now on."""
        for part in HANDS:
            here = self.project / part
            here.unlink(missing_ok=True)
            here.symlink_to(of / part)

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
def own_fleet(stack: str, of: Path) -> Generator[OwnFleet]:
    """A project with the files of another one and a state of its own; its lab goes with it."""
    project = of / ".gpuyard" / f"{stack}-{secrets.token_hex(3)}"
    (project / "fleets").mkdir(parents=True)
    # Who looks for the project where a file really lies has to find this one there.
    for folder in ("stacks", "tools", "collections"):
        shutil.copytree(of / folder, project / folder, symlinks=True, ignore=shutil.ignore_patterns("config"))
    shutil.copytree(of / "inventories/lab", project / f"inventories/{stack}")
    (project / f"inventories/{stack}/fleet.pulumi.yml").write_text(f"plugin: gpuyard.fleet.pulumi\nstack: {stack}\n")
    for part in (".venv", "Pulumi.yaml", "activate", "ansible.cfg", "requirements", "src"):
        (project / part).symlink_to(of / part)
    made = OwnFleet(stack, project, free_port())
    made.take_hands(of)
    try:
        made.done("tools/setup", "state", "pulumi")
        yield made
    finally:
        # What a lab that does not go leaves is needed to see why.
        made.done("gpuyard", "lab", "down", "--stack", stack)
        shutil.rmtree(project)


def wait(what: str, condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CommandError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


@contextmanager
def load(own: OwnFleet, rate: float = 20, seed: int = 0) -> Generator[dict[str, Any]]:
    """Requests at the gateway all the while; what became of them is there afterwards."""
    told: dict[str, Any] = {}
    words = ["gpuyard", "bench", "load", f"http://127.0.0.1:{own.port}", "--rate", str(rate), "--duration", "1800"]
    words += ["--key-file", f".gpuyard/secrets/{own.stack}/api_key", "--seed", str(seed), "--json"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "report").open("w+") as out:
        ledger = Path(folder) / "ledger"
        child = subprocess.Popen(
            own.words(*words, "--ledger", str(ledger)),
            cwd=own.project,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )

        def begun() -> bool:
            if child.poll() is not None:
                raise CommandError(f"the load ended with {child.returncode} before it began")
            return ledger.is_file() and ledger.read_bytes().count(b"\n") > 2 * rate

        try:
            wait("the load to begin", begun)
            yield told
            if child.poll() is not None:
                raise CommandError(f"the load ended with {child.returncode} before what it was to meet")
        finally:
            # It sends nothing new, waits for what runs, and tells.
            child.send_signal(signal.SIGINT)
            child.wait(timeout=120)
        out.seek(0)
        told |= json.loads(out.read())
        told["lines"] = [json.loads(line) for line in ledger.read_text().splitlines()]
    own.say(str({name: told[name] for name in ("requests", "complete", *LOST)}))
    reasons = Counter((line["outcome"], line["why"][:100]) for line in told["lines"] if line["why"])
    for (outcome, why), number in reasons.most_common(5):
        own.say(f"  {number} {outcome}: {why}")
