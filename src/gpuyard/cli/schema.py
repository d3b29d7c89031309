"""`gpuyard schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gpuyard.cli.write import write
from gpuyard.plan.sizing.plan import plan_schema_text
from gpuyard.spec.schema import fleet_schema_text


def register(app: typer.Typer) -> None:
    app.command()(schema)


def schema(
    document: Annotated[
        Literal["fleet", "plan"], typer.Argument(help="A fleet's spec, or what `gpuyard plan --json` prints.")
    ] = "fleet",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the schema to this file.")] = None,
) -> None:
    """Print the JSON Schema of a fleet's spec, for editors, or of a plan."""
    text = fleet_schema_text() if document == "fleet" else plan_schema_text()
    if output is None:
        typer.echo(text, nl=False)
    else:
        write(output, text)
