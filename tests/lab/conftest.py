"""Labs for tests: each in a project folder of its own, on a disk that can hold overlays, and gone afterwards."""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuyard.lab import agent
from gpuyard.lab.errors import LabError
from gpuyard.lab.models import LabRef, NodeSpec, NodeState
from gpuyard.lab.own_fleet import free_port
from gpuyard.lab.place import Place, default_cache

PROJECT = Path(__file__).resolve().parents[2]
CANNOT = {"LAB-OS", "LAB-ROOT", "LAB-ROOTFS", "LAB-TOOLS", "LAB-CGROUP", "LAB-FS"}


@dataclass(frozen=True)
class Lab:
    """A lab with words for what tests do to it."""

    ref: LabRef
    port: int

    @property
    def place(self) -> Place:
        return Place(self.ref, default_cache())

    def up(self) -> agent.NetworkState:
        return agent.network_up(self.ref, self.port)

    def gateway(self, name: str = "t-gateway-0") -> NodeState:
        return agent.node_up(self.ref, NodeSpec(name=name, role="gateway"))

    def gpu(self, name: str = "t-chat-0") -> NodeState:
        spec = NodeSpec(name=name, role="gpu", pool="chat", gpu="H100-SXM5-80GB", gpu_count=8)
        return agent.node_up(self.ref, spec)

    def on(self, node: NodeState, command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        words = [*agent.login(self.ref, node), command]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, input="")

    def said(self, node: NodeState, command: str) -> str:
        done = self.on(node, command)
        assert done.returncode == 0, f"{command!r}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


@pytest.fixture(scope="session")
def lab_project() -> Iterator[Path]:
    folder = PROJECT / ".gpuyard" / f"test-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def new_lab(lab_project: Path) -> Iterator[Callable[[str], Lab]]:
    """Makes labs that are taken down at the end, whatever a test left of them."""
    made: list[Lab] = []

    def make(stack: str) -> Lab:
        lab = Lab(LabRef(project=lab_project, stack=stack), free_port())
        made.append(lab)
        try:
            lab.up()
        except LabError as refused:
            if refused.rule in CANNOT and not os.environ.get("CI"):
                pytest.skip(str(refused))
            raise
        return lab

    yield make
    for lab in made:
        agent.lab_down(lab.ref)


@pytest.fixture(scope="session")
def lab(new_lab: Callable[[str], Lab]) -> Lab:
    """The lab most tests share."""
    return new_lab("shared")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A lab that is only folders."""
    return Place(LabRef(project=tmp_path / "project", stack="lab"), tmp_path / "cache")


@contextlib.contextmanager
def refused(rule: str) -> Iterator[pytest.ExceptionInfo[LabError]]:
    with pytest.raises(LabError) as caught:
        yield caught
    assert caught.value.rule == rule, str(caught.value)
