"""`gpuyard plan`: what a fleet's models need, how fast they are, and what that costs against an API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gpuyard.cli.plan import AsJson, FleetFile
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.cli.write import write
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import load_fleet

if TYPE_CHECKING:
    from gpuyard.plan.sizing.throughput import Measured


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    fleet: FleetFile,
    page: Annotated[Path | None, typer.Option("--html", help="Write one page with plots to this file.")] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="What `gpuyard bench load --json` printed of a model. May be given again."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reckon what a fleet needs and costs: memory, network, cold start, power, money; exit 1 if something is red."""
    # Its many models take longer to import than most of our commands take to run.
    from gpuyard.catalog import load_catalog, load_instances, load_market
    from gpuyard.cli.sizing_tables import tell
    from gpuyard.plan.sizing.givens import Givens
    from gpuyard.plan.sizing.page import html
    from gpuyard.plan.sizing.plan import plan_of
    from gpuyard.plan.sizing.room import NoRooms

    with refusals_told(as_json):
        found = load_fleet(fleet)
        measured = dict(_measured(path, {model.name for model in found.models}) for path in bench or [])
        givens = Givens(
            catalog=load_catalog(),
            market=load_market(),
            instances=load_instances(),
            rooms=NoRooms(),
            today=datetime.now(UTC).date().isoformat(),
            measured=measured,
        )
        made = plan_of(found, givens)
        if page:
            write(page, html(made))
        if as_json:
            typer.echo(made.model_dump_json(indent=2))
        else:
            tell(made, page)
        if made.verdict == "red":
            raise typer.Exit(FINDINGS)


def _measured(path: Path, models: set[str]) -> tuple[str, Measured]:
    from gpuyard.plan.sizing.throughput import Measured

    change = "name a file with what `gpuyard bench load --json` printed"
    try:
        told = cast("Mapping[str, Any]", json.loads(path.read_text()))
        model, rate = str(told["model"]), float(told["tokens_per_second"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise RefusedError("PLAN-BENCH", str(path), why, change) from error
    if model not in models:
        why = f"it is of {model}, the fleet serves {', '.join(sorted(models))}"
        raise RefusedError("PLAN-BENCH", str(path), why, change)
    if rate <= 0:
        raise RefusedError("PLAN-BENCH", str(path), "it counted no token", "measure again under load")
    return model, Measured(rate, path.name)
