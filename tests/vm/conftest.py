"""One QEMU node for all the tests here, for boots and builds are dear; a test that fails takes it down with itself.

The next test then gets a new one, and brings it by itself to where it begins: `Guest.having`.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.place import Place, default_cache

PROJECT = Path(__file__).resolve().parents[2]
SECONDS = 600
"""The longest that one thing may take inside: ten times as long as the slowest takes where nothing else runs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Guest:
    """A QEMU node with words for what tests do to it."""

    lab: agent.LabRef
    name: str = "t-vm"
    made: dict[Callable[..., Any], Any] = field(default_factory=dict[Callable[..., Any], Any])
    """What was done to the node that is there, and what came of it."""

    def having(self, make: Callable[["Guest"], T]) -> T:
        """Do something to the node, unless that was done to it before."""
        if make not in self.made:
            self.made[make] = make(self)
        return cast(T, self.made[make])

    def down(self) -> None:
        self.made.clear()
        agent.vm_down(self.lab, self.name)

    @property
    def place(self) -> Place:
        return Place(self.lab, default_cache())

    @property
    def state(self) -> agent.VmState:
        return next(state for state in agent.vms_read(self.lab) if state.name == self.name)

    def up(self) -> agent.VmState:
        state = agent.vm_up(self.lab, self.name)
        self.settle()
        return state

    def settle(self) -> None:
        """Until all that starts at boot has started, or failed."""
        self.on("systemctl is-system-running --wait")

    def cut(self) -> None:
        agent.vm_cut(self.lab, self.name)

    def on(self, command: str, timeout: float = SECONDS) -> subprocess.CompletedProcess[str]:
        words = [*agent.vm_login(self.lab, self.name), command]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, input="")

    def said(self, command: str) -> str:
        done = self.on(command)
        assert done.returncode == 0, f"{command!r}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def reboot(self) -> None:
        before = self.boot
        self.on("systemctl reboot")

        def back() -> bool:
            try:
                # Soon given up: what is asked of a machine that is just going down is not answered when it is back.
                done = self.on("cat /proc/sys/kernel/random/boot_id", 10)
            except subprocess.TimeoutExpired:
                return False
            return done.returncode == 0 and done.stdout.strip() != before

        assert host.wait_until(back, SECONDS, 1)
        self.settle()

    @property
    def boot(self) -> str:
        return self.said("cat /proc/sys/kernel/random/boot_id")

    @property
    def kernel(self) -> str:
        return self.said("uname --kernel-release")

    @property
    def kernels(self) -> list[str]:
        """The newer ones that lie ready as packages, oldest first."""
        return self.said("ls /var/lib/gpuyard-lab/kernels | sort --version-sort").split()

    @property
    def driver(self) -> str:
        """The loaded one."""
        return self.said("cat /sys/module/nvidia/version")

    def play(self, role: str, **variables: object) -> subprocess.CompletedProcess[str]:
        """Run a role on it, as a playbook would."""
        role_play = {"name": "Run a role", "hosts": "all", "gather_facts": False, "roles": [f"gpuyard.fleet.{role}"]}
        playbook = self.place.state / "guest.yml"
        playbook.write_text(json.dumps([role_play]))
        return self.playbook(playbook, **variables)

    def playbook(
        self, playbook: Path, *words: str, seconds: float = SECONDS, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a playbook on a fleet that it alone is the GPU nodes of."""
        port, ssh = self.state.port, self.place.ssh
        host = {
            "ansible_host": "127.0.0.1",
            "ansible_port": port,
            "ansible_user": "root",
            "ansible_timeout": 120,  # an emulated machine on a busy one
            "ansible_ssh_private_key_file": str(ssh / "id_ed25519"),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={ssh}/known_hosts -o IdentitiesOnly=yes",
            "ansible_python_interpreter": "/usr/bin/python3",
            **variables,
        }
        inventory = self.place.state / "guest.json"
        inventory.write_text(json.dumps({"gpu_nodes": {"hosts": {self.name: host}}}))
        return subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, playbook, *words],
            cwd=PROJECT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
                "GPUYARD_PROJECT": str(self.lab.project),
            },
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            input="",
        )

    @contextmanager
    def at_work(self, command: str, line: str) -> Generator[subprocess.Popen[str]]:
        """While a command runs that has said a line."""
        words = ["timeout", str(SECONDS), *agent.vm_login(self.lab, self.name), command]
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as running:
            try:
                assert running.stdout
                said = "".join(rows_until(running.stdout, line))
                assert line in said, f"{command!r} ended and did not say {line!r}: {said}"
                yield running
            finally:
                running.terminate()


def rows_until(rows: Iterable[str], line: str) -> Iterator[str]:
    for row in rows:
        yield row
        if line in row:
            return


@pytest.fixture(scope="session")
def node() -> Iterator[Guest]:
    folder = PROJECT / ".gpuyard" / f"test-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    guest = Guest(agent.LabRef(project=folder, stack="vm"))
    try:
        yield guest
    finally:
        agent.lab_down(guest.lab)
        shutil.rmtree(folder)


@pytest.fixture
def guest(node: Guest, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """The node, with power: the one that the last test left, or a new one if that test failed."""
    try:
        if not any(state.running for state in agent.vms_read(node.lab)):
            node.up()
        yield node
    finally:
        if not request.node.stash.get(PASSED, False):
            node.down()


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report
