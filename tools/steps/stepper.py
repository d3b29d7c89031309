"""Run steps side by side, each when those it needs are done; say what goes on, and what came of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

OK, DONE, FAILED, NOT_RUN = "ok", "done", "failed", "not run"

# What the programs we call say when nothing answers them, whatever it is they fetch.
UNREACHABLE = re.compile(
    r"could not resolve|temporary failure (in name resolution|resolving)|name or service not known|no such host"
    r"|dns error|failed to lookup address|network is unreachable|no route to host|connection refused"
    r"|connection timed out|i/o timeout|operation timed out|tls handshake timeout|cannot initiate the connection"
    r"|failed to establish a new connection|error sending request|unable to connect",
    re.IGNORECASE,
)
UNTRUSTED = re.compile(r"unknownissuer|certificate[ _]verify|invalid peer certificate|unknown authority", re.IGNORECASE)
TAIL = 25


class SetupError(Exception):
    """What was found, why it is refused, and the smallest change that would pass."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


class NeedsRootError(SetupError):
    """Everything but this can be done without root, so it is told apart."""


@dataclass(frozen=True)
class Step:
    """One thing that is there (`ready` says what stands) or is made."""

    name: str
    ready: Callable[[], str | None]
    make: Callable[[Work], str]
    needs: tuple[str, ...] = ()
    seconds: int = 600
    """The longest it may take."""
    gib: float = 0
    """The disk it takes."""
    source: str = ""
    """Where what it fetches comes from, for who has to open a way there."""


@dataclass
class Result:
    outcome: str
    seconds: float
    detail: str


@dataclass
class Work:
    """What a step runs its commands with: one log, one deadline, and an end to all that it started."""

    step: Step
    log: Path
    deadline: float
    held: tuple[int, ...] = ()
    """Descriptors of our lock: a command that outlives us keeps the next set-up from building into the same place."""

    def run(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        words = [str(word) for word in command]
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            at = log.tell()
            try:
                child = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=None if env is None else dict(env),
                    cwd=cwd,
                    start_new_session=True,
                    pass_fds=self.held,
                )
            except OSError as error:
                raise SetupError("SETUP-COMMAND", f"{words[0]} cannot be run: {error.strerror}") from error
            CHILDREN.add(child)
            try:
                code = child.wait(max(self.deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                end(child)
                raise SetupError(
                    "SETUP-DEADLINE",
                    f"{words[0]} was stopped: the step had {self.step.seconds} s; "
                    f"run set-up again, it goes on where it can\n{self.tail(at)}",
                ) from None
            finally:
                CHILDREN.discard(child)
        if code:
            said = self.tail(at)
            missing = f"{self.step.name} is missing and comes from {self.step.source}"
            if self.step.source and UNTRUSTED.search(said):
                raise SetupError(
                    "SETUP-TRUST",
                    f"{missing}. This machine does not know who signed the certificate of what answered; if that is "
                    "your own mirror, put its authority's certificate into /usr/local/share/ca-certificates, run "
                    f"update-ca-certificates and then set-up again\n{said}",
                )
            if self.step.source and UNREACHABLE.search(said):
                raise SetupError(
                    "SETUP-NETWORK",
                    f"{missing}, which did not answer; give this machine a way there (the proxy and mirror settings of "
                    f"each tool count) and run set-up again\n{said}",
                )
            raise SetupError("SETUP-COMMAND", f"`{' '.join(words[:6])} …` ended with {code}\n{said}")

    def tail(self, start: int = 0) -> str:
        lines = self.log.read_bytes()[start:].decode(errors="replace").replace("\r", "\n").splitlines()
        shown = [f"    | {line}" for line in lines if line.strip()][-TAIL:]
        return "\n".join([*shown, f"    the whole log: {self.log}"])


CHILDREN: set[subprocess.Popen[bytes]] = set()


def end(child: subprocess.Popen[bytes]) -> None:
    """Stop a command and all that it started; politely first, so that it can clean up."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
        except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            continue


def end_all() -> None:
    for child in list(CHILDREN):
        end(child)


@dataclass
class Stepper:
    steps: Mapping[str, Step]
    logs: Path
    held: tuple[int, ...] = ()
    say: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    every: float = 30
    """Seconds between two lines about what is still running."""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.talk = threading.Lock()

    def run(self, names: Iterable[str]) -> dict[str, Result]:
        """All the named steps, with those they need. What does not need a failed one is still done."""
        wanted = in_order(self.steps, names)
        results: dict[str, Result] = {}
        running: dict[Future[Result], tuple[str, float]] = {}
        with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
            while len(results) < len(wanted):
                for name in wanted:
                    step = self.steps[name]
                    if name in results or name in {busy for busy, _ in running.values()}:
                        continue
                    if lacking := [need for need in step.needs if need in results and stopped(results[need])]:
                        results[name] = Result(NOT_RUN, 0, f"needs {', '.join(lacking)}")
                    elif all(need in results for need in step.needs):
                        running[pool.submit(self.take, step)] = (name, time.monotonic())
                if not running:
                    continue
                finished, _ = wait(running, timeout=self.every, return_when=FIRST_COMPLETED)
                for future in finished:
                    name, _ = running.pop(future)
                    results[name] = future.result()
                if not finished:
                    now = time.monotonic()
                    self.tell("…", ", ".join(f"{name} {clock(now - since)}" for name, since in running.values()))
        return {name: results[name] for name in wanted}

    def take(self, step: Step) -> Result:
        began = time.monotonic()
        try:
            stands = step.ready()
            if stands is not None:
                return Result(OK, time.monotonic() - began, stands)
            self.tell(step.name, "…")
            log = self.logs / f"{step.name}.log"
            log.write_bytes(b"")
            made = step.make(Work(step, log, began + step.seconds, self.held))
        except SetupError as refusal:
            outcome = NOT_RUN if isinstance(refusal, NeedsRootError) else FAILED
            self.tell(step.name, f"{outcome}\n{refusal}")
            return Result(outcome, time.monotonic() - began, refusal.rule)
        except OSError as error:
            refusal = SetupError(
                "SETUP-FILES", f"{error.strerror or error}: {error.filename}; mend that and run set-up again"
            )
            self.tell(step.name, f"{FAILED}\n{refusal}")
            return Result(FAILED, time.monotonic() - began, refusal.rule)
        self.tell(step.name, f"{DONE} in {clock(time.monotonic() - began)}")
        return Result(DONE, time.monotonic() - began, made)

    def tell(self, name: str, line: str) -> None:
        with self.talk:
            self.say(f"{clock(time.monotonic() - self.started):>6}  {name:<10} {line}")


def stopped(result: Result) -> bool:
    return result.outcome in (FAILED, NOT_RUN)


def in_order(steps: Mapping[str, Step], names: Iterable[str]) -> list[str]:
    """The named steps and all that they need, none before what it needs."""
    order: list[str] = []

    def add(name: str, behind: tuple[str, ...]) -> None:
        if name in behind:
            raise ValueError(f"steps need each other: {' → '.join([*behind, name])}")
        for need in steps[name].needs:
            add(need, (*behind, name))
        if name not in order:
            order.append(name)

    for name in names:
        if name not in steps:
            raise SetupError("SETUP-STEP", f"there is no step '{name}'; there are {', '.join(steps)}")
        add(name, ())
    return order


def table(results: Mapping[str, Result]) -> str:
    width = max(len(name) for name in results)
    rows = [
        f"  {name:<{width}}  {result.outcome:<7}  {clock(result.seconds):>6}  {result.detail}"
        for name, result in results.items()
    ]
    return "\n".join(rows)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def interrupted(*_: object) -> None:
    end_all()
    print("set-up was interrupted; run it again, it goes on where it can", file=sys.stderr, flush=True)
    os._exit(130)
