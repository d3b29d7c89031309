"""One playbook, run as a user would run it, and what its events say while it runs."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import typer

from gpuyard.lab.errors import LabError

RULE = re.compile(r"\b[A-Z][A-Z0-9]+(-[A-Z0-9]+)+: ")


@dataclass
class Told:
    """What a playbook has said so far."""

    doing: dict[str, str] = field(default_factory=dict[str, str])
    """The task that each node is at."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """The note of each node, as it was last seen."""
    since: dict[str, float] = field(default_factory=dict[str, float])
    """When each node came to the state that it is in, by time.monotonic()."""
    claim: dict[str, Any] = field(default_factory=dict[str, Any])
    plan: list[str] = field(default_factory=list[str])
    failures: list[str] = field(default_factory=list[str])
    rc: int = 1
    output: Path = Path()
    """All that ansible printed."""
    moved: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Each node that came to another state, and to which, in the order in which they came."""

    def hear(self, event: dict[str, Any]) -> None:
        """One event of ansible-runner."""
        data: dict[str, Any] = event.get("event_data") or {}
        result: dict[str, Any] = data.get("res") or {}
        host = str(data.get("host", ""))
        if event["event"] == "runner_on_start":
            self.doing[host] = str(data.get("task", ""))
        elif event["event"] == "runner_on_ok":
            self.ok(host, data, result)
        elif event["event"] in ("runner_on_failed", "runner_on_unreachable") and not data.get("ignore_errors"):
            told = " ".join(str(result.get("msg") or data.get("task", "")).split())
            match = RULE.search(told)
            line = told[match.start() :] if match else f"{host}: {data.get('task', '')}: {told}"
            if line not in self.failures:
                self.failures.append(line)

    def ok(self, host: str, data: dict[str, Any], result: dict[str, Any]) -> None:
        action = str(data.get("resolved_action") or data.get("task_action", ""))
        if action.endswith("node_upgrade") and result.get("note"):
            note = result["note"]
            if note["state"] != self.notes.get(host, {}).get("state"):
                self.since[host] = time.monotonic()
                self.moved.append((host, note["state"]))
            self.notes[host] = note
        elif action.endswith("rollout") and result.get("claim"):
            self.claim = result["claim"]
        elif data.get("task") == "Print the plan":
            self.plan = list(result.get("msg") or [])


class Play:
    """A playbook on its way. It runs in a session of its own: what the terminal says to us it does not hear."""

    def __init__(self, project: Path, stack: str, playbook: str, words: Sequence[str]) -> None:
        if not (project / "inventories" / stack).is_dir():
            raise LabError("CLI-INVENTORY", f"{project} has no inventories/{stack}", change="name another --stack")
        arguments = ["-i", f"inventories/{stack}", f"playbooks/operate/{playbook}.yml", *words]
        self.line = shlex.join(["ansible-playbook", *arguments])
        self.told = Told()
        self.runs = project / ".gpuyard/runs"
        self.folder = Path(tempfile.mkdtemp(prefix="runner-", dir=state_of(project)))
        self.cancelled = threading.Event()
        # It takes longer to import than most of our commands take to run.
        import ansible_runner  # pyright: ignore[reportMissingTypeStubs]

        begin = cast(Any, ansible_runner.run_command_async)  # pyright: ignore[reportUnknownMemberType]
        self.thread, self.runner = cast(
            "tuple[threading.Thread, Any]",
            begin(
                "ansible-playbook",
                cmdline_args=arguments,
                private_data_dir=str(self.folder),
                host_cwd=str(project),
                # ansible-runner would have nodes whose key nobody knows, and keep facts.
                envvars={"ANSIBLE_HOST_KEY_CHECKING": "True"},
                fact_cache_type="memory",
                quiet=True,
                event_handler=self.heard,
                cancel_callback=self.cancelled.is_set,
            ),
        )

    def heard(self, event: dict[str, Any]) -> bool:
        self.told.hear(event)
        return False  # what ansible prints is kept, its events are not

    def kill(self) -> None:
        self.cancelled.set()

    def ended(self, seconds: float) -> bool:
        """Wait so long for the end; whether it came."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            return False
        # None: it died of a signal.
        self.told.rc = 1 if self.runner.rc is None else self.runner.rc
        if self.folder.is_dir():
            self.keep()
        return True

    def wait(self) -> Told:
        """Wait for the end, however long it takes."""
        while not self.ended(1):
            pass
        return self.told

    def keep(self) -> None:
        """What ansible printed goes to the record of its run; nothing else is kept."""
        run = self.told.claim.get("run", "")
        recorded = bool(run) and (self.runs / run).is_dir()
        home = self.runs / run if recorded else self.folder.parent
        self.told.output = home / "ansible-playbook.log"
        printed = Path(str(self.runner.config.artifact_dir)) / "stdout"
        if printed.is_file():
            self.told.output.touch(mode=0o600)
            with self.told.output.open("ab" if recorded else "wb") as kept:
                kept.write(f"\n$ {self.line}\n".encode() + printed.read_bytes())
        shutil.rmtree(self.folder)


def state_of(project: Path) -> Path:
    folder = project / ".gpuyard"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def interrupts(handler: Callable[[int], None]) -> Generator[None]:
    """While it lasts, Ctrl-C calls the handler with how often it was pressed, and ends nothing by itself."""
    pressed = 0

    def hear(_signal: int, _frame: object) -> None:
        nonlocal pressed
        pressed += 1
        handler(pressed)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def played(project: Path, stack: str, playbook: str, words: Sequence[str]) -> Told:
    """Run a playbook to its end, without a view."""
    play = Play(project, stack, playbook, words)
    typer.echo(f"↳ {play.line}", err=True)
    return play.wait()
