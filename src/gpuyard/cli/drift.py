"""The command `gpuyard drift`: a playbook that looks at every node, or the engine that looks at what they stand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gpuyard.cli.lab import Stack, console, project_of
from gpuyard.cli.play import played
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.cli.write import answer
from gpuyard.provision.drift import Drift, Step, drifted
from gpuyard.spec.errors import RefusedError

RESULT = Path(".gpuyard/drift.json")  # what the playbook writes


def register(app: typer.Typer) -> None:
    app.command()(drift)


def drift(
    stack: Stack = "lab",
    infrastructure: Annotated[
        bool,
        typer.Option("--infrastructure", help="Ask the cloud instead of the nodes: what is gone, what is changed."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Say where a driver has moved away from the fleet's lock, and which node would not survive its next reboot."""
    with refusals_told(as_json):
        if infrastructure:
            found = look_at_infrastructure(project_of(), stack)
            lines = [str(drift) for drift in found] or [f"the infrastructure of {stack} is as `pulumi up` left it"]
            answer(as_json, {"infrastructure": [drift.as_dict() for drift in found]}, "\n".join(lines))
            if found:
                raise typer.Exit(FINDINGS)
            return
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


def look_at_infrastructure(project: Path, stack: str) -> list[Drift]:
    """What the account has otherwise than the state. Neither is changed. Raises RefusedError where it is not told."""
    typer.echo(f"↳ pulumi refresh --preview-only --stack {stack}", err=True)
    # It takes longer to import than most of our commands take to run.
    from pulumi import automation

    steps: list[Step] = []

    def heard(event: automation.EngineEvent) -> None:
        if event.res_outputs_event:
            told = event.res_outputs_event.metadata
            old, new = told.old, told.new
            if old:
                steps.append(
                    Step(str(told.op.value), told.urn, told.type, old.id, old.inputs or {}, (new and new.inputs) or {})
                )

    try:
        automation.select_stack(stack, work_dir=str(project)).preview_refresh(on_event=heard)
    except (automation.CommandError, OSError) as error:
        change = "see that `pulumi` is on PATH, that it knows the stack, and that your credentials still hold"
        raise RefusedError(
            "DRIFT-UNKNOWN", str(error)[-1000:], "so nothing is known of the infrastructure", change
        ) from error
    return list(drifted(steps, stack))


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
