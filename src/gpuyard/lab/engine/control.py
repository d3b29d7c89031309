"""The faults of the engine, read from a file whenever it has changed, so that they come and go while it serves.

{"hang": bool, "wrong_token_rate": 0..1, "latency_factor": x, "crash_on_prompt": text, "seed": n,
 "exit_at_start": {"code": n, "message": text}}
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Faults:
    hang: bool = False
    """No token comes, of running requests neither; health and metrics answer, as in life."""
    wrong_token_rate: float = 0.0
    """Share of tokens that are others than they should be."""
    latency_factor: float = 1.0
    """How many times longer everything takes."""
    crash_on_prompt: str = ""
    """A prompt with this text ends the engine."""
    exit_at_start: Any = None
    """{"code": n, "message": text}: the engine ends before it listens."""
    seed: int = 0
    """Chooses which tokens are wrong."""


KINDS: dict[str, Any] = {
    "hang": bool,
    "wrong_token_rate": (int, float),
    "latency_factor": (int, float),
    "crash_on_prompt": str,
    "exit_at_start": (dict, type(None)),
    "seed": int,
}


class Control:
    """Looks at the file when asked, reads it only when it is another than before."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen: object = None
        self.faults = Faults()

    def now(self) -> Faults:
        try:
            status = os.stat(self.path)  # noqa: PTH116 - asked for every token
            mark = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            mark = None
        if mark != self.seen:
            self.seen = mark
            self.faults = Faults() if mark is None else self.read()
        return self.faults

    def read(self) -> Faults:
        """A file that cannot be understood is no fault: it is told, and what was before stays."""
        try:
            with open(self.path, encoding="utf-8") as file:  # noqa: PTH123
                told: Any = json.load(file)
            for name, value in told.items():
                if name not in KINDS:
                    raise ValueError(f"it has {name}; known are {', '.join(KINDS)}")
                if not isinstance(value, KINDS[name]):
                    raise ValueError(f"{name} is {value!r}")
            return Faults(**told)
        except (OSError, ValueError, AttributeError) as error:
            print(f"CONTROL-FILE: {self.path}: {error}; what it said before holds on", flush=True)
            return self.faults
