"""The command `gpuyard`: parse, call, print. Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpuyard.cli import drift, fit, guard, hosts, plan, rehearse, sizing
from gpuyard.cli.bench import app as bench_app
from gpuyard.cli.faults import app as lab_app  # the lab's commands and those that break it
from gpuyard.cli.refusals import tell
from gpuyard.cli.upgrade import app as upgrade_app
from gpuyard.cli.upgrade import runs_app
from gpuyard.cli.vm import app as vm_app
from gpuyard.cli.write import write
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.schema import fleet_schema_text

app = typer.Typer(
    name="gpuyard",
    help="Run your own LLMs on your own GPU machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

plan.register(app)
sizing.register(app)
drift.register(app)
hosts.register(app)
guard.register(app)
rehearse.register(app)
fit.register(app)
lab_app.add_typer(vm_app)
app.add_typer(lab_app)
app.add_typer(bench_app)
app.add_typer(upgrade_app)
app.add_typer(runs_app)


def main() -> None:
    try:
        app()
    except RefusedError as refused:
        sys.exit(tell(refused, as_json=False))


@app.command()
def schema(
    document: Annotated[
        Literal["fleet", "plan"], typer.Argument(help="A fleet's spec, or what `gpuyard plan --json` prints.")
    ] = "fleet",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the schema to this file.")] = None,
) -> None:
    """Print the JSON Schema of a fleet's spec, for editors, or of a plan."""
    from gpuyard.plan.sizing.plan import plan_schema_text  # as slow to import as the command `plan`

    text = fleet_schema_text() if document == "fleet" else plan_schema_text()
    if output is None:
        typer.echo(text, nl=False)
    else:
        write(output, text)
