"""Puts the collection gpuyard.fleet into the wheel, where Ansible finds it beside every other installed collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COLLECTION = Path("ansible_collections/gpuyard/fleet")
# The requirements are what the role vllm_server installs engines from: the lock names them by path and digest.
REQUIREMENTS = ("bootstrap.txt", "engine-cpu.txt", "engine-cuda.txt")
PARTS = ("galaxy.yml", "LICENSE", "README.md", "meta", "playbooks", "plugins", "roles")


class WheelHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # An editable install would get a copy, and not see later edits of the clone.
        if version == "editable":
            return
        for part in (*PARTS, *(f"requirements/{name}" for name in REQUIREMENTS)):
            build_data["force_include"][str(Path(self.root) / part)] = str(COLLECTION / part)
