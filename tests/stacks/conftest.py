"""A project of its own with the real engine, a file backend, and a lab that is a file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stacks.helpers import world

ALL = ["network_up 8080", "node_up lab-chat-0", "node_up lab-chat-1", "node_up lab-gateway-0"]
REPOSITORY = Path(__file__).resolve().parents[2]

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


@dataclass
class Stack:
    """The stack `lab` of a project."""

    project: Path
    environment: dict[str, str]

    def keep(self, name: str) -> None:
        shutil.copytree(self.project, self.project.with_name(name), symlinks=True)

    def put_back(self, name: str) -> None:
        shutil.rmtree(self.project)
        shutil.copytree(self.project.with_name(name), self.project, symlinks=True)

    def pulumi(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["pulumi", *words, "--non-interactive", "--color", "never"],
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def done(self, *words: str) -> str:
        ran = self.pulumi(*words)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def up(self) -> list[str]:
        """Bring it up; what the lab was asked to change meanwhile."""
        with world(self.project) as found:
            found["calls"] = []
        self.done("up", "--yes", "--skip-preview")
        with world(self.project) as found:
            return sorted(found["calls"])

    def planned(self) -> dict[str, Any]:
        """What `pulumi preview` says."""
        return json.loads(self.done("preview", "--json"))

    @staticmethod
    def steps(planned: dict[str, Any]) -> dict[str, list[str]]:
        """Names by what would be done to them; what stays the same is left out."""
        steps: dict[str, list[str]] = {}
        for step in planned["steps"]:
            if step["op"] != "same":
                steps.setdefault(step["op"], []).append(step["urn"].rsplit("::", 1)[1])
        return {op: sorted(names) for op, names in steps.items()}

    def handover(self) -> dict[str, Any]:
        return json.loads(self.done("stack", "output", "handover", "--json"))

    def state(self) -> dict[str, Any]:
        """Resources in the state, by name."""
        resources = json.loads(self.done("stack", "export"))["deployment"].get("resources", [])
        return {resource["urn"].rsplit("::", 1)[1]: resource for resource in resources}

    def ask_for(self, nodes: int) -> None:
        """Another number of chat nodes."""
        spec = (REPOSITORY / "fleets/lab.yaml").read_text()
        assert "    nodes: 2\n" in spec
        (self.project / "fleets/lab.yaml").write_text(spec.replace("    nodes: 2\n", f"    nodes: {nodes}\n"))


@pytest.fixture(scope="session")
def pulumi_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pulumi-home")


@pytest.fixture(scope="session")
def new_stack(tmp_path_factory: pytest.TempPathFactory, pulumi_home: Path) -> Stack:
    """A project with an empty stack: the repository's settings and fleet, and a program that asks a pretended lab."""
    assert shutil.which("pulumi"), "no pulumi on PATH; run `. ./activate` first"
    project = tmp_path_factory.mktemp("stacks") / "a project"
    for folder in ("stacks", "fleets", "backend"):
        (project / folder).mkdir(parents=True)
    (project / ".venv").symlink_to(sys.prefix)
    shutil.copy(REPOSITORY / "Pulumi.yaml", project)
    (project / "stacks/__main__.py").write_text(PROGRAM)
    for name in ("lab.yaml", "lab.lock.yaml"):
        shutil.copy(REPOSITORY / "fleets" / name, project / "fleets")
    (project / "passphrase").write_text("of a test\n")
    environment = {
        **os.environ,
        "PULUMI_HOME": str(pulumi_home),
        # As `activate` has it: a file of attributes beside each file is not written whole or not at all.
        "PULUMI_BACKEND_URL": f"file://{project}/backend?metadata=skip",
        "PULUMI_CONFIG_PASSPHRASE_FILE": str(project / "passphrase"),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "GPUYARD_PROJECT": str(project),
    }
    made = Stack(project, environment)
    made.done("stack", "select", "--create", "lab")
    made.keep("new")
    return made


@pytest.fixture(scope="session")
def whole_stack(new_stack: Stack) -> Stack:
    new_stack.put_back("new")
    assert new_stack.up() == ALL
    new_stack.keep("whole")
    return new_stack


@pytest.fixture
def empty(new_stack: Stack) -> Stack:
    """The stack before its first `up`."""
    new_stack.put_back("new")
    return new_stack


@pytest.fixture
def stack(whole_stack: Stack) -> Stack:
    """The stack after its first `up`. The same for each test: the project is put back as it was, at the same path."""
    whole_stack.put_back("whole")
    return whole_stack
