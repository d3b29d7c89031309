"""The stack's own state, as the engine last wrote it down."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pulumi

from gpuyard.spec.errors import RefusedError

_SECONDS = 120


def deployment() -> dict[str, Any]:
    """Resources and pending operations of this stack. RefusedError where the engine does not tell them."""
    name = f"{pulumi.get_organization()}/{pulumi.get_project()}/{pulumi.get_stack()}"
    command = ["pulumi", "stack", "export", "--stack", name, "--non-interactive"]
    try:
        # The engine gives its program no way to its state; it takes no lock to read it, also while an `up` has one.
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        why = "without its state nobody knows what a killed `up` left half made"
        raise RefusedError("AWS-STATE", f"`{' '.join(command)}`: {said}", why, "put `pulumi` on PATH") from error
    return json.loads(told).get("deployment") or {}
