"""Kill a converge at random moments, run it again, and compare the nodes with those of an undisturbed run.

Each round starts from fresh nodes of the `molecule` fleet, kills the whole process group of `ansible-playbook` with
SIGKILL at a random moment, runs the same playbook to its end, asks verify.yml, and compares each node's state with
the reference: packages and holds, files below /etc, /usr/local and /var/lib/models, enabled units. The moment is one of
the reference run, told as a task and a time within it, so that a faster or slower run is met at the same place.

Usage: python tools/bench_kill.py [--rounds 10] [--seed N] [--stack molecule]
Exit code 0 only if every round came to the reference state.
"""

import argparse
import bisect
import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools.project import PROJECT, run

PATIENCE = 1800  # seconds, of one command

# Files that differ between two machines that are the same by intent are left out: identities, caches. Of others it is
# told what can be the same: that the key of the lab's own repository is there, new with each lab, and the times of a
# checked model; and of accounts all but the day they were made.
STATE = r"""
dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\n'
apt-mark showhold
systemctl list-unit-files --no-legend --state=enabled,disabled,masked | sort
find /etc /var/lib/models /usr/local -type f ! -name '*.pyc' ! -name machine-id ! -name ld.so.cache ! -name '*.cache' \
  ! -name resolv.conf ! -path '/etc/ssh/ssh_host_*' ! -name '*-' ! -name '.*.stat' \
  ! -path /etc/apt/keyrings/gpuyard-nvidia.asc ! -path /etc/shadow -print0 | sort -z | xargs -0 sha256sum
find /etc/apt/keyrings /var/lib/models -type f -printf '%p %m\n' | sort
cut -d: -f1,2 /etc/shadow
"""


def must(*argv: str) -> str:
    """One command that has to succeed; its output."""
    done = run(*argv, timeout=PATIENCE)
    if done.rc:
        sys.exit(f"{' '.join(argv)} ended with {done.rc}\n{done.output[-4000:]}")
    return done.output


def fresh(stack: str) -> None:
    """New machines, nothing on them."""
    must("gpuyard", "lab", "down", "--stack", stack)
    must("pulumi", "stack", "select", "--create", stack)
    must("pulumi", "up", "--stack", stack, "--yes", "--skip-preview")


def state(stack: str) -> dict[str, list[str]]:
    """Each node's state, a line per fact."""
    facts: dict[str, list[str]] = {}
    for node in (f"{stack}-gateway-0", f"{stack}-chat-0"):
        facts[node] = must("gpuyard", "lab", "ssh", "--stack", stack, node, "--", STATE).splitlines()
    return facts


def digest(facts: dict[str, list[str]]) -> str:
    """Twelve hex digits that name a state."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]


def killed_when(due: Callable[[], bool], *argv: str, log: Path = Path(os.devnull)) -> bool:
    """Start a command and SIGKILL its process group as soon as `due` says so. False if it ended before that."""
    with log.open("w") as out:
        child = subprocess.Popen(
            argv,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # What it does is read from what it prints, while it does it.
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    deadline = time.monotonic() + 1800
    while child.poll() is None:
        if due() or time.monotonic() > deadline:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return True
        time.sleep(0.02)
    return False


class Watch:
    """Follows a playbook by what it prints: when each of its tasks began, in seconds since its start."""

    log = PROJECT / ".gpuyard/bench_kill.site"

    def __init__(self) -> None:
        self.began: list[float] = []
        self.log.unlink(missing_ok=True)
        self.started = time.monotonic()

    def look(self) -> int:
        """How many tasks have begun by now."""
        tasks = self.log.read_text().count("\nTASK [") if self.log.is_file() else 0
        self.began += [time.monotonic() - self.started] * (tasks - len(self.began))
        return tasks

    def has_passed(self, task: int, seconds: float) -> bool:
        """Whether so long has gone by in a task, or the next one has begun."""
        tasks = self.look()
        return tasks > task or (tasks == task and time.monotonic() - self.started >= self.began[-1] + seconds)


def main() -> int:
    """Reference run, then the rounds; prints a line each and what differed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311  (dice, not a secret)
    options.add_argument("--stack", default="molecule")
    args = options.parse_args()
    dice = random.Random(args.seed)  # noqa: S311
    site = ("ansible-playbook", "-i", f"inventories/{args.stack}", "playbooks/site.yml")
    verify = ("ansible-playbook", "-i", f"inventories/{args.stack}", "playbooks/verify.yml")

    print(f"seed {args.seed}: reference run on fresh nodes", flush=True)
    fresh(args.stack)
    watch = Watch()
    killed_when(lambda: watch.look() < 0, *site, log=Watch.log)
    whole, began = time.monotonic() - watch.started, watch.began
    must(*verify)
    reference = state(args.stack)
    print(f"reference: converged in {whole:.0f} s, state {digest(reference)}", flush=True)

    failures = 0
    for number in range(1, args.rounds + 1):
        fresh(args.stack)
        moment = dice.uniform(began[0], began[-1])
        task = bisect.bisect(began, moment)
        within = moment - began[task - 1]
        watch = Watch()
        killed = killed_when(functools.partial(watch.has_passed, task, within), *site, log=Watch.log)
        again = run(*site, timeout=PATIENCE)
        healthy = again.rc == 0 and run(*verify, timeout=PATIENCE).rc == 0
        found = state(args.stack)
        same = found == reference
        print(
            f"round {number:2}: {'killed' if killed else 'had ended'} {within:4.1f} s into task {task:3}, "
            f"again: rc {again.rc}, verify {'green' if healthy else 'RED'}, "
            f"state {digest(found)} {'same' if same else 'DIFFERS'}",
            flush=True,
        )
        if again.rc:
            print(again.output[-3000:])
        for node in reference:
            for line in sorted(set(reference[node]) ^ set(found[node])):
                print(f"    {node}: {'missing' if line in reference[node] else 'extra  '} {line}")
        failures += not (killed and healthy and same)
    must("gpuyard", "lab", "down", "--stack", args.stack)
    print(f"{args.rounds - failures} of {args.rounds} kills converged to the reference state")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
