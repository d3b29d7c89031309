"""This project, and commands that are run in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gpuyard.lab import own_fleet

PROJECT = Path(__file__).resolve().parents[1]
run = partial(own_fleet.run, project=PROJECT)
