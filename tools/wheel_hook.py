"""Puts the collection gpuyard.fleet into the wheel, where Ansible finds it beside every other installed collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COLLECTION = Path("ansible_collections/gpuyard/fleet")
# The requirements are what the role vllm_server installs engines from: the lock names them by path and digest.
REQUIREMENTS = ("bootstrap.txt", "engine-*.txt")
PARTS = ("galaxy.yml", "LICENSE", "README.md", "meta", "playbooks", "plugins", "roles")


class WheelHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # An editable install would get a copy, and not see later edits of the clone.
        if version == "editable":
            return
        root = Path(self.root)
        requirements = [path for name in REQUIREMENTS for path in root.glob(f"requirements/{name}")]
        for path in [*(root / part for part in PARTS), *requirements]:
            build_data["force_include"][str(path)] = str(COLLECTION / path.relative_to(root))
