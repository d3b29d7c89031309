"""How the command line answers and writes files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import typer

from gpuyard.spec.errors import RefusedError


def write(path: Path, text: str) -> None:
    # A reader never sees half a file, and a full disk leaves the old one.
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text)
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        why = error.strerror or type(error).__name__
        raise RefusedError("CLI-WRITE", str(path), why, "name a file in a folder that can be written") from error


def answer(as_json: bool, data: Mapping[str, object], text: str) -> None:
    typer.echo(json.dumps(data, indent=2) if as_json else text)
