"""A project of its own with the real engine, a file backend, and a lab that is a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.engine import REPOSITORY, Stack, new_project
from tests.stacks.helpers import world

ALL = ["network_up 8080", "node_up lab-chat-0", "node_up lab-chat-1", "node_up lab-gateway-0"]

# The program of the repository, but for the lab it asks.
PROGRAM = """
from pathlib import Path

import pulumi

from gpuyard.spec.loader import load_fleet
from stacks.layouts.lab import LabFleet

project = Path(__file__).resolve().parent.parent
layout = LabFleet(
    load_fleet(project / "fleets/lab.yaml"), project=project, stack=pulumi.get_stack(), agent="tests.stacks.helpers"
)
pulumi.export("handover", layout.handover)
"""


class LabStack(Stack):
    """The stack `lab` of a project."""

    def keep(self, name: str) -> None:
        shutil.copytree(self.project, self.project.with_name(name), symlinks=True)

    def put_back(self, name: str) -> None:
        shutil.rmtree(self.project)
        shutil.copytree(self.project.with_name(name), self.project, symlinks=True)

    def up(self) -> list[str]:
        """Bring it up; what the lab was asked to change meanwhile."""
        with world(self.project) as found:
            found["calls"] = []
        self.done("up", "--yes", "--skip-preview")
        with world(self.project) as found:
            return sorted(found["calls"])

    @staticmethod
    def steps(planned: dict[str, Any]) -> dict[str, list[str]]:
        """Names by what would be done to them; what stays the same is left out."""
        steps: dict[str, list[str]] = {}
        for step in planned["steps"]:
            if step["op"] != "same":
                steps.setdefault(step["op"], []).append(step["urn"].rsplit("::", 1)[1])
        return {op: sorted(names) for op, names in steps.items()}

    def state(self) -> dict[str, Any]:
        """Resources in the state, by name."""
        return {resource["urn"].rsplit("::", 1)[1]: resource for resource in self.exported().get("resources", [])}

    def ask_for(self, nodes: int) -> None:
        """Another number of chat nodes."""
        spec = (REPOSITORY / "fleets/lab.yaml").read_text()
        assert "    nodes: 2\n" in spec
        (self.project / "fleets/lab.yaml").write_text(spec.replace("    nodes: 2\n", f"    nodes: {nodes}\n"))


@pytest.fixture(scope="session")
def pulumi_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pulumi-home")


@pytest.fixture(scope="session")
def new_stack(tmp_path_factory: pytest.TempPathFactory, pulumi_home: Path) -> LabStack:
    """A project with an empty stack: the repository's settings and fleet, and a program that asks a pretended lab."""
    assert shutil.which("pulumi"), "no pulumi on PATH; run `. ./activate` first"
    project = tmp_path_factory.mktemp("stacks") / "a project"
    environment = new_project(project, pulumi_home)
    (project / "stacks/__main__.py").write_text(PROGRAM)
    for name in ("lab.yaml", "lab.lock.yaml"):
        shutil.copy(REPOSITORY / "fleets" / name, project / "fleets")
    made = LabStack(project, environment)
    made.done("stack", "select", "--create", "lab")
    made.keep("new")
    return made


@pytest.fixture(scope="session")
def whole_stack(new_stack: LabStack) -> LabStack:
    new_stack.put_back("new")
    assert new_stack.up() == ALL
    new_stack.keep("whole")
    return new_stack


@pytest.fixture
def empty(new_stack: LabStack) -> LabStack:
    """The stack before its first `up`."""
    new_stack.put_back("new")
    return new_stack


@pytest.fixture
def stack(whole_stack: LabStack) -> LabStack:
    """The stack after its first `up`. The same for each test: the project is put back as it was, at the same path."""
    whole_stack.put_back("whole")
    return whole_stack
