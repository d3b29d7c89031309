"""`gpuyard plan`: what a fleet's models need, how fast they are, and what that costs against an API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from ruamel.yaml import YAML

from gpuyard.catalog import load_catalog, load_instances
from gpuyard.catalog.market import load_market
from gpuyard.catalog.memory import load_memory, load_shapes
from gpuyard.cli.fit_cases import read_rows
from gpuyard.cli.models import model_shape
from gpuyard.cli.plan import AsJson, FleetFile, today
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.cli.sizing_tables import tell
from gpuyard.cli.write import write
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.sizing.chosen import chosen
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.page import html
from gpuyard.plan.sizing.plan import plan_of
from gpuyard.plan.sizing.room import CatalogRooms
from gpuyard.plan.sizing.throughput import Measured
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    fleet: FleetFile,
    page: Annotated[Path | None, typer.Option("--html", help="Write one page with plots to this file.")] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="What `gpuyard bench load --json` printed of a model. May be given again."),
    ] = None,
    learned: Annotated[
        Path | None, typer.Option("--learned", help="Starts of your own, as `gpuyard fit --learned` keeps them.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config", metavar="MODEL=PATH", help="A model's own config.json, or its directory. May be given again."
        ),
    ] = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="Choose machines, nodes and parallelism: the least bill for the load.")
    ] = False,
    spec: Annotated[
        Path | None, typer.Option("--spec", help="Write the fleet as it was planned to this file, to check and lock.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reckon what a fleet needs and costs: memory, network, cold start, power, money; exit 1 if something is red."""
    with refusals_told(as_json):
        found = load_fleet(fleet)
        told = dict(_shape_told(word, {model.name for model in found.models}) for word in config or [])
        measured = dict(_measured(path, {model.name for model in found.models}) for path in bench or [])
        catalog = load_catalog()
        givens = Givens(
            catalog=catalog,
            market=load_market(),
            instances=load_instances(),
            rooms=CatalogRooms(
                catalog, load_memory(), load_shapes(), list(read_rows(learned)) if learned else (), told
            ),
            today=today(),
            measured=measured,
        )
        if choose:
            found = chosen(found, givens)
        made = plan_of(found, givens)
        if spec:
            write(spec, _spec_text(found))
        if page:
            write(page, html(made))
        if as_json:
            typer.echo(made.model_dump_json(indent=2))
        else:
            tell(made, page)
        if made.verdict == "red":
            raise typer.Exit(FINDINGS)


def _spec_text(fleet: Fleet) -> str:
    """The fleet as a file; what is not said is left out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    text = StringIO()
    data = fleet.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    yaml.dump(data, text)  # pyright: ignore[reportUnknownMemberType]
    return f"# Written by `gpuyard plan`.\n{text.getvalue()}"


def _shape_told(word: str, models: set[str]) -> tuple[str, Shape]:
    """A model of the fleet and its shape. Raises RefusedError: PLAN-CONFIG, FIT-CONFIG, FIT-FILES."""
    model, equals, path = word.partition("=")
    change = "say MODEL=PATH, with a name from the fleet's models and a config.json or a directory with one"
    if not equals or not path:
        raise RefusedError("PLAN-CONFIG", f"--config {word}", "it names no model and path", change)
    if model not in models:
        why = f"the fleet serves {', '.join(sorted(models))}"
        raise RefusedError("PLAN-CONFIG", f"--config {word}", why, change)
    if not (Path(path).is_dir() or Path(path).is_file()):
        raise RefusedError("PLAN-CONFIG", f"--config {word}", "there is no such file or directory", change)
    return model, model_shape(path)


def _measured(path: Path, models: set[str]) -> tuple[str, Measured]:
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
