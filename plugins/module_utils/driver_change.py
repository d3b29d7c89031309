"""What speaks against changing a node's driver, before anything is done to it: pure judgement of what a module found.

Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from ansible_collections.gpuyard.fleet.plugins.module_utils.readiness import (
    locked,
    too_full,
    unfinished,
    unsigned,
    unwritable,
)


def numbers(version: str) -> tuple[int, ...]:
    """580.126.20 as numbers, to be compared."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))


def findings(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Each with its rule, what is asked, what is there, and the smallest change that passes. Empty: go on.

    `asked`: node, target and previous (version, packages), needs (engine: oldest driver), free_mib (folder: MiB),
    users (patterns of units that are stopped for the change). `facts`: what the module `driver_change` gathers.
    """
    target, previous = asked["target"], asked["previous"]
    node = asked["node"]
    found: list[str] = []
    what = f"driver {target['version']}"
    found += unfinished(what, node, facts) + unwritable(what, node, facts)
    # What the driver's own packages are held with is the hold of their last install.
    held = sorted(set(facts["held"]) & set(target["packages"]) - set(previous["packages"]))
    if held:
        found.append(
            f"APT-HELD: driver {target['version']} brings {', '.join(held)}, which somebody holds on {node}. Agree "
            f"with them and release it there: `apt-mark unhold {' '.join(held)}`"
        )
    found += locked(node, facts)
    found += too_full("driver", asked, facts, "nvidia_driver_free_mib_below")
    if not facts["container"]:
        if not facts["headers"] and not facts["headers_offered"]:
            found.append(
                f"DRIVER-HEADERS: the modules of driver {target['version']} are built against the headers of kernel "
                f"{facts['kernel']}, which {node} neither has nor is offered. Bring linux-headers-{facts['kernel']} "
                "into a repository of the node, or boot it with a kernel that has its headers"
            )
        found += unsigned("driver", node, facts)
    strangers = [
        user for user in facts["gpu_users"] if not any(fnmatchcase(user["unit"], own) for own in asked["users"])
    ]
    if strangers:
        names = ", ".join(f"{user['command']} (pid {user['pid']}, {user['unit'] or 'no unit'})" for user in strangers)
        found.append(
            f"DRIVER-BUSY: the driver of {node} is to be unloaded, and others than its engines hold a GPU: {names}. "
            "End them, then run this again"
        )
    for engine, least in sorted(asked["needs"].items()):
        for what, driver in (("target", target), ("way back", previous)):
            if numbers(driver["version"]) < numbers(least):
                found.append(
                    f"DRIVER-ENGINE: {engine} on {node} needs driver {least} or newer, and the {what} is "
                    f"{driver['version']}. Lock a newer driver, or an engine that is built with an older CUDA"
                )
    return found
