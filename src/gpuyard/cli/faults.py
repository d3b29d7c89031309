"""The commands `gpuyard lab break`, `mend` and `faults`."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gpuyard.cli.lab import USAGE, Stack, app, lab_of
from gpuyard.cli.refusals import refusals_told
from gpuyard.cli.vm import app as vm_app
from gpuyard.lab import agent
from gpuyard.lab.faults.model import Fault
from gpuyard.lab.faults.table import FAULTS

Node = Annotated[str, typer.Argument(help="The node's name, or `controller`: this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")]

app.add_typer(vm_app)


def register(root: typer.Typer) -> None:
    root.add_typer(app)


@app.command(name="break")
def break_(
    node: Node,
    fault: Annotated[str, typer.Argument(help="What to break; `gpuyard lab faults` lists them.")],
    parameters: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="As the list says.")] = None,
    gpu: Annotated[int | None, typer.Option("--gpu", help="Which GPU; without it, the first.")] = None,
    after: Annotated[float, typer.Option("--after", min=0, help="Break it so many seconds later.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Whatever chance decides is drawn with it.")] = 0,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """Break a node on purpose; the same seed breaks it the same way."""
    with usage_told():
        row = agent.fault_break(lab_of(stack), node, fault, gpu, seed, parameters or [], after)
    if as_json:
        typer.echo(json.dumps(row, indent=2))
    else:
        when = f" breaks in {after:g} s" if after else " is broken"
        typer.echo(f"{node}: {fault}{when} ({chosen(row)}); `gpuyard lab mend {node} {fault}` mends it")


@app.command()
def mend(
    node: Node,
    fault: Annotated[str | None, typer.Argument(help="What to mend.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Mend all that is broken there, or waits to be.")] = False,
    stack: Stack = "lab",
) -> None:
    """Mend what `break` has broken: the node is as before."""
    if (fault is None) != everything:
        typer.secho("FAULT-USAGE: name one fault, or say --all", err=True)
        raise typer.Exit(USAGE)
    with usage_told():
        mended = agent.fault_mend(lab_of(stack), node, fault)
    typer.echo(f"{node}: mended {', '.join(mended)}" if mended else f"{node}: nothing is broken")


@app.command()
def faults(
    active: Annotated[bool, typer.Option("--active", help="What is broken in the lab now, instead.")] = False,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """List all faults: what each imitates, where that was seen, and what may be chosen."""
    if active:
        with usage_told():
            rows = agent.faults_read(lab_of(stack))
        columns = ["node", "fault", "stage", "chosen", "said"]
        lines = [[row["node"], row["fault"], row["stage"], chosen(row), row["said"]] for row in rows]
    else:
        rows = [listed(fault) for fault in FAULTS.values()]
        columns = ["fault", "imitates", "parameters", "rows", "source"]
        lines = [
            [row["id"], row["imitates"], " ".join(words_of(row)), " ".join(row["rows"]), row["source"]] for row in rows
        ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def listed(fault: Fault) -> dict[str, Any]:
    parameters = [
        {
            "name": parameter.name,
            "meaning": parameter.meaning,
            "default": parameter.default,
            "among": list(parameter.among) or None,
            "between": parameter.between,
        }
        for parameter in fault.parameters
    ]
    return {
        "id": fault.id,
        "imitates": fault.imitates,
        "source": fault.source,
        "rows": list(fault.rows),
        "breaks": fault.target,
        "of_one_gpu": fault.of_gpu,
        "needs": list(fault.needs),
        "parameters": parameters,
    }


def words_of(row: dict[str, Any]) -> list[str]:
    gpu = ["--gpu"] if row["of_one_gpu"] else []
    return [*gpu, *(f"{parameter['name']}={parameter['default']}" for parameter in row["parameters"])]


def chosen(row: dict[str, Any]) -> str:
    gpu = [] if row["gpu"] is None else [f"gpu {row['gpu']}"]
    values = [f"{name}={value}" for name, value in row["parameters"].items() if value]
    return ", ".join([*gpu, *values, f"seed {row['seed']}"])


@contextmanager
def usage_told() -> Generator[None]:
    """Words that name nothing are wrong usage; all else that is refused is a refusal."""
    try:
        with refusals_told():
            yield
    except typer.Exit as ended:
        said = ended.__cause__
        if getattr(said, "rule", "") == "FAULT-USAGE":
            raise typer.Exit(USAGE) from said
        raise
