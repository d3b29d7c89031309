"""A project of its own in which the real engine runs, and the engine's commands on its stack."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Stack:
    """A project with one stack. `seconds`: how long each command of the engine took."""

    project: Path
    environment: dict[str, str]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def command(*words: str) -> list[str]:
        return ["pulumi", *words, "--non-interactive", "--color", "never"]

    def pulumi(self, *words: str) -> subprocess.CompletedProcess[str]:
        began = time.monotonic()
        ran = subprocess.run(
            self.command(*words),
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        self.seconds.setdefault(words[0], []).append(time.monotonic() - began)
        return ran

    def done(self, *words: str) -> str:
        ran = self.pulumi(*words)
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
        return ran.stdout

    def killed_up(self, due: Callable[[], bool], seconds: float = 300) -> bool:
        """Start an `up` and kill all of it as soon as `due` says so. False if it ended before that."""
        child = subprocess.Popen(
            self.command("up", "--yes", "--skip-preview"),
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + seconds
        while child.poll() is None:
            if due() or time.monotonic() > deadline:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                return True
            time.sleep(0.02)
        return False

    def planned(self) -> dict[str, Any]:
        """What `pulumi preview` says."""
        return json.loads(self.done("preview", "--json"))

    def exported(self) -> dict[str, Any]:
        """The state, whole."""
        return json.loads(self.done("stack", "export"))["deployment"]

    def handover(self) -> dict[str, Any]:
        return json.loads(self.done("stack", "output", "handover", "--json"))


def new_project(project: Path, home: Path) -> dict[str, str]:
    """An empty project with the repository's settings, and the environment of its engine. `home`: of its plugins."""
    for folder in ("stacks", "fleets", "backend"):
        (project / folder).mkdir(parents=True)
    (project / ".venv").symlink_to(sys.prefix)
    shutil.copy(REPOSITORY / "Pulumi.yaml", project)
    (project / "passphrase").write_text("of a test\n")
    return {
        **os.environ,
        "PULUMI_HOME": str(home),
        # As `activate` has it: a file of attributes beside each file is not written whole or not at all.
        "PULUMI_BACKEND_URL": f"file://{project}/backend?metadata=skip",
        "PULUMI_CONFIG_PASSPHRASE_FILE": str(project / "passphrase"),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "GPUYARD_PROJECT": str(project),
    }
