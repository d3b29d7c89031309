"""The command `gpuyard drift`: a playbook that looks at every node, and what it found as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gpuyard.cli.lab import Stack, console, project_of
from gpuyard.cli.play import played
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.spec.errors import RefusedError

RESULT = Path(".gpuyard/drift.json")  # what the playbook writes


def register(app: typer.Typer) -> None:
    app.command()(drift)


def drift(
    stack: Stack = "lab",
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Say where a driver has moved away from the fleet's lock, and which node would not survive its next reboot."""
    with refusals_told(as_json):
        nodes = look(project_of(), stack)
        if as_json:
            typer.echo(json.dumps(nodes, indent=2))
        else:
            tell(nodes)
        if any(node["failed"] or node["findings"] for node in nodes.values()):
            raise typer.Exit(FINDINGS)


def look(project: Path, stack: str) -> dict[str, dict[str, Any]]:
    """What the playbook found on each node. Raises RefusedError where it did not come to write that."""
    result = project / RESULT
    result.unlink(missing_ok=True)  # what an earlier run found must not pass for what this one did
    told = played(project, stack, "check_drift", [])
    try:
        return json.loads(result.read_text())
    except (OSError, ValueError) as error:
        found = told.failures[0] if told.failures else f"the playbook ended with {told.rc} and wrote no {RESULT}"
        change = f"{told.output} has all that it printed"
        raise RefusedError("DRIFT-UNKNOWN", found, "so nothing is known of any node", change) from error


def tell(nodes: dict[str, dict[str, Any]]) -> None:
    table = Table("node", "loaded", "locked", "boots next", "drifted")
    for name, node in nodes.items():
        rules = list(dict.fromkeys(finding["rule"] for finding in node["findings"]))
        cells = (node.get(key) or "-" for key in ("loaded", "locked", "next_kernel"))
        table.add_row(name, *cells, "unknown" if node["failed"] else ", ".join(rules) or "no")
    console().print(table)
    for name, node in nodes.items():
        if node["failed"]:
            typer.echo(f"{name}: {node['failed']}")
        for finding in node["findings"]:
            typer.echo(f"{name}: {finding['rule']}: {finding['found']}: {finding['why']}; {finding['change']}")
