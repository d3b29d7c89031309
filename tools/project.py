"""This project, and commands that are run in it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gpuyard.lab import own_fleet

PROJECT = Path(__file__).resolve().parents[1]
run = partial(own_fleet.run, project=PROJECT)


def landed() -> str:
    """The commit that this state is a change of: where its branch left the main one, or the one before it. A name of
    its own in GPUYARD_LANDED; HEAD where the clone has no history."""
    named = os.environ.get("GPUYARD_LANDED")
    if named:
        return named
    here, fork, before = (
        subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()
        for argv in (
            ("git", "rev-parse", "HEAD"),
            ("git", "merge-base", "HEAD", "origin/main"),
            ("git", "rev-parse", "--quiet", "--verify", "HEAD^"),
        )
    )
    return fork if fork not in ("", here) else before or here


@contextmanager
def files_of(commit: str) -> Generator[Path]:
    """A folder with the project's files as they were then. CalledProcessError where there is no such commit."""
    with tempfile.TemporaryDirectory(dir=PROJECT / ".gpuyard") as folder:
        packed = subprocess.run(("git", "archive", commit), cwd=PROJECT, stdout=subprocess.PIPE, check=True)
        subprocess.run(("tar", "-x", "-C", folder), input=packed.stdout, check=True)
        yield Path(folder)
