"""The commands `gpuyard lab vm …`: nodes in QEMU, for what only a kernel and a power plug of one's own can show."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.table import Table

from gpuyard.cli.lab import Stack, console, lab_of
from gpuyard.cli.refusals import refusals_told
from gpuyard.lab import agent

app = typer.Typer(
    name="vm", help="Nodes in QEMU: a kernel, disks and a power plug of their own. Slow.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The node's name.")]
AccelOption = Annotated[
    agent.Accel,
    typer.Option("--accel", envvar="GPUYARD_VM_ACCEL", help="Emulate the processor, or use KVM where it works."),
]


@app.command()
def up(name: Name, stack: Stack = "lab", accel: AccelOption = "tcg") -> None:
    """Make a node, or give power to one that has none; ends when one can log in. A running one is left alone."""
    with refusals_told():
        state = agent.vm_up(lab_of(stack), name, accel)
        typer.echo(f"{name} answers at 127.0.0.1:{state.port}: gpuyard lab vm ssh {name}")


@app.command(context_settings={"ignore_unknown_options": True})
def ssh(
    name: Name,
    command: Annotated[list[str] | None, typer.Argument(help="What to run there; without it, a shell.")] = None,
    stack: Stack = "lab",
) -> None:
    """Log in to a node as root, its host key checked. Ends with the exit code of what ran there."""
    with refusals_told():
        words = [*agent.vm_login(lab_of(stack), name), *(command or [])]
    os.execvp(words[0], words)  # noqa: S606 - the user's own words go to the user's own machine


@app.command()
def cut(name: Name, stack: Stack = "lab") -> None:
    """Cut the power of a node: what it had not written to its disks is lost. `up` gives it back."""
    with refusals_told():
        agent.vm_cut(lab_of(stack), name)


@app.command()
def status(
    stack: Stack = "lab",
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Show every QEMU node: whether it has power, and where its SSH is."""
    with refusals_told():
        states = agent.vms_read(lab_of(stack))
        if as_json:
            typer.echo(json.dumps([state.model_dump(mode="json") for state in states], indent=2))
            return
        table = Table("node", "running", "SSH")
        for state in states:
            table.add_row(state.name, "yes" if state.running else "no", f"127.0.0.1:{state.port or '-'}")
        console().print(table)


@app.command()
def down(name: Name, stack: Stack = "lab") -> None:
    """Remove a node with its disks. `gpuyard lab down` removes them all."""
    with refusals_told():
        agent.vm_down(lab_of(stack), name)
