"""A project with an exported state, read by the real `ansible-inventory`."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpuyard.spec.loader import load_fleet
from stacks.layouts.lab import handover_of, specs_of

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"


def handover() -> dict[str, Any]:
    """What the stack of the committed lab fleet hands over."""
    fleet = load_fleet(REPOSITORY / "fleets/lab.yaml")
    specs = [spec for pool in specs_of(fleet).values() for spec in pool]
    key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\nmDM\n-----END PGP PUBLIC KEY BLOCK-----\n"
    return handover_of(
        fleet,
        "lab",
        specs,
        {"user": "root", "private_key_file": "/p/id_ed25519", "known_hosts_file": "/p/known_hosts"},
        {
            "nvidia": {"uri": "http://10.77.0.1:8099/nvidia", "key": key, "fingerprint": "A" * 40},
            "models": {"uri": "http://10.77.0.1:8099/models"},
        },
        {"host_port": 8080, "node_port": 8080},
        {spec.name: f"10.77.0.{index}" for index, spec in enumerate(specs, 10)},
    )


@dataclass
class Project:
    """A folder with a fleet, its lock, an inventory and an exported state."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def inventory(self) -> Path:
        return self.folder / "inventories/lab/fleet.pulumi.yml"

    def settings(self, **options: object) -> None:
        self.inventory.write_text(json.dumps({"plugin": "gpuyard.fleet.pulumi", "stack": "lab", **options}))

    def export(self, outputs: dict[str, Any]) -> None:
        stack = {"urn": "urn:pulumi:lab::gpuyard::pulumi:pulumi:Stack::gpuyard-lab", "type": "pulumi:pulumi:Stack"}
        state = {"version": 3, "deployment": {"resources": [{**stack, "outputs": outputs}]}}
        (self.folder / "state.json").write_text(json.dumps(state))

    def hand_over(self, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
        told = copy.deepcopy(handover())
        edit(told)
        self.export({"handover": told})

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env={**self.environment, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "COLUMNS": "400"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def answers(self, *question: str) -> dict[str, Any]:
        done = self.run("ansible-inventory", "-i", "inventories/lab", *question)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout, object_hook=plain)

    def with_a_backend(self) -> None:
        """From now on the command is asked, about an empty backend."""
        assert shutil.which("pulumi"), "no pulumi on PATH; run `. ./activate` first"
        for folder in ("backend", "stacks"):
            (self.folder / folder).mkdir()
        (self.folder / "passphrase").write_text("of a test\n")
        self.environment |= {
            "PULUMI_HOME": str(self.folder / "home"),
            "PULUMI_BACKEND_URL": f"file://{self.folder}/backend?metadata=skip",
            "PULUMI_CONFIG_PASSPHRASE_FILE": str(self.folder / "passphrase"),
            "PULUMI_SKIP_UPDATE_CHECK": "true",
        }
        self.settings()

    def pulumi(self, *words: str) -> None:
        done = self.run(shutil.which("pulumi") or "", *words, "--non-interactive")
        assert done.returncode == 0, done.stderr

    def refuses(self) -> str:
        """The line with the cause."""
        done = self.run("ansible-inventory", "-i", "inventories/lab", "--list")
        assert done.returncode != 0, done.stdout
        causes = {line.rsplit("plugin: ", 1)[-1] for line in done.stderr.splitlines() if "plugin: " in line}
        assert len(causes) == 1, done.stderr
        return causes.pop()


def plain(value: dict[str, Any]) -> Any:
    """Ansible marks what it will not evaluate as a template; here only the text matters."""
    return value.get("__ansible_unsafe", value)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "a project"
    (folder / "inventories/lab").mkdir(parents=True)
    (folder / "fleets").mkdir()
    shutil.copytree(REPOSITORY / "inventories/lab/group_vars", folder / "inventories/lab/group_vars")
    for name in ("Pulumi.yaml", "fleets/lab.lock.yaml"):
        shutil.copy(REPOSITORY / name, folder / name)
    made = Project(folder)
    made.settings(source="state_file", state_file="../../state.json")
    made.hand_over()
    return made
