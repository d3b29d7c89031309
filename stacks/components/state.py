"""The stack's own state, as the engine last wrote it down."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pulumi

from gpuyard.spec.errors import RefusedError

_SECONDS = 120


class State:
    """Asked for when it is made, so that the engine reads it while the program goes on."""

    def __init__(self) -> None:
        name = f"{pulumi.get_organization()}/{pulumi.get_project()}/{pulumi.get_stack()}"
        self._command = ["pulumi", "stack", "export", "--stack", name, "--non-interactive"]
        # The engine gives its program no way to its state; it takes no lock to read it, also while an `up` has one.
        self._told = ThreadPoolExecutor(1).submit(
            subprocess.run, self._command, capture_output=True, text=True, check=True, timeout=_SECONDS
        )

    def deployment(self) -> dict[str, Any]:
        """Resources and pending operations of this stack. RefusedError where the engine does not tell them."""
        try:
            told = self._told.result().stdout
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()
            why = "without its state nobody knows what a killed `up` left half made"
            what = f"`{' '.join(self._command)}`: {said}"
            raise RefusedError("AWS-STATE", what, why, "put `pulumi` on PATH") from error
        return json.loads(told).get("deployment") or {}
