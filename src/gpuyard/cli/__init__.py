"""The command `gpuyard`: parse, call, print. Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 refused."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from gpuyard.catalog import load_catalog
from gpuyard.cli.bench import app as bench_app
from gpuyard.cli.faults import app as lab_app  # the lab's commands and those that break it
from gpuyard.cli.refusals import FINDINGS, refusals_told, tell
from gpuyard.cli.vm import app as vm_app
from gpuyard.plan.lock import lock_path
from gpuyard.plan.resolve import resolve
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import load_fleet
from gpuyard.spec.schema import fleet_schema_text

app = typer.Typer(
    name="gpuyard",
    help="Run your own LLMs on your own GPU machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

lab_app.add_typer(vm_app)
app.add_typer(lab_app)
app.add_typer(bench_app)

FleetFile = Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet's spec, e.g. fleets/lab.yaml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")]


def main() -> None:
    try:
        app()
    except RefusedError as refused:
        sys.exit(tell(refused, as_json=False))


@app.command()
def check(fleet: FleetFile, as_json: AsJson = False) -> None:
    """Read a fleet's spec and tell everything that is wrong with it."""
    with refusals_told(as_json):
        found = load_fleet(fleet)
        _answer(as_json, {"fleet": found.name, "findings": []}, f"{fleet}: fleet {found.name} is well-formed")


@app.command()
def lock(
    fleet: FleetFile,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if the lock would change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose driver, packages, engines and models for a fleet and write them beside its spec."""
    with refusals_told(as_json):
        made = resolve(load_fleet(fleet), load_catalog(), _requirements(fleet))
        path, text = lock_path(fleet), made.to_yaml()
        before = path.read_text() if path.is_file() else ""
        outdated = before != text
        if outdated and not check:
            _write(path, text)
        answer = {"fleet": made.fleet, "lock": str(path), "digest": made.digest, "changed": outdated}
        if outdated and check:
            diff = difflib.unified_diff(
                before.splitlines(), text.splitlines(), str(path), "as it would be", lineterm=""
            )
            _answer(as_json, answer, "\n".join(diff))
            raise typer.Exit(FINDINGS)
        _answer(as_json, answer, f"{path}: {'written' if outdated else 'unchanged'}, {made.digest}")


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the schema to this file.")] = None,
) -> None:
    """Print the JSON Schema of a fleet's spec, for editors."""
    if output is None:
        typer.echo(fleet_schema_text(), nl=False)
    else:
        _write(output, fleet_schema_text())


def _requirements(fleet_file: Path) -> dict[str, str]:
    """Digests of the project's requirements files. The project is the folder above `fleets/`."""
    project = fleet_file.resolve().parent.parent
    return {
        path.relative_to(project).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(project.glob("requirements/*.txt"))
    }


def _write(path: Path, text: str) -> None:
    # A reader never sees half a file, and a full disk leaves the old one.
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text)
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        why = error.strerror or type(error).__name__
        raise RefusedError("CLI-WRITE", str(path), why, "name a file in a folder that can be written") from error


def _answer(as_json: bool, data: Mapping[str, object], text: str) -> None:
    typer.echo(json.dumps(data, indent=2) if as_json else text)
