"""`gpuyard guard`: what would a `pulumi up` lose, open or spend? Read from a file, with no cloud and no engine."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from gpuyard.catalog import load_instances
from gpuyard.catalog.market import load_market
from gpuyard.cli.plan import AsJson
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.guard import read
from gpuyard.guard.rules import Allowed, findings
from gpuyard.plan.sizing.cost import node_price, offers_of
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import load_fleet
from gpuyard.spec.planning import Purchase

# How the SDK's documentation says it, of a property by itself.
_FORCES = re.compile(r"(?i)\b(changing this (value )?)?forces (replacement|(a )?new resource)\b|\bforces? recreation\b")


def register(app: typer.Typer) -> None:
    app.command()(guard)


def guard(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="What `pulumi preview --json --show-sames` or `pulumi stack export` wrote."
        ),
    ],
    fleet: Annotated[
        Path | None, typer.Option("--fleet", help="Hold ports and cost against this fleet's spec and its plan.")
    ] = None,
    drained: Annotated[
        list[str] | None, typer.Option("--drained", metavar="NODE", help="A node that serves nothing any more.")
    ] = None,
    release: Annotated[
        list[str] | None, typer.Option("--release", metavar="NAME", help="A reservation to be given up.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Refuse what must not come of a `pulumi up`: open groups, wide rights, lost nodes, cost above the plan."""
    with refusals_told(as_json):
        resources = read(_data(file))
        allowed = Allowed(
            drained=frozenset(drained or ()),
            released=frozenset(release or ()),
            forces_replacement=documented_to_replace,
            **(_of_fleet(fleet) if fleet else {}),
        )
        found = findings(resources, allowed)
        if as_json:
            told = {"resources": len(resources), "findings": [finding.as_dict() for finding in found]}
            typer.echo(json.dumps(told, indent=2))
        else:
            for finding in found:
                typer.echo(str(finding))
            typer.echo(f"{file}: {len(resources)} resources, {len(found)} findings")
        if found:
            raise typer.Exit(FINDINGS)


def _data(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        why = "it cannot be read" if isinstance(error, OSError) else "it is no JSON"
        change = "write it with `pulumi preview --json --show-sames` or `pulumi stack export`"
        raise RefusedError("GUARD-FILE", str(file), why, change) from error


def _of_fleet(path: Path) -> dict[str, Any]:
    """The gateway's port, what the plan says that the machines cost, and what each costs by the catalog."""
    spec, market, instances = load_fleet(path), load_market(), load_instances()
    rows = {row.instance: row for row in instances}
    region = spec.planning.region if spec.planning else None
    prices = {pool.name: node_price(spec, pool, market, instances) for pool in spec.pools}
    known = [its.figure.value * pool.nodes for pool in spec.pools if (its := prices[pool.name]).figure]
    stated = {
        (its.instance.instance, its.purchase): its.figure.value
        for its in prices.values()
        if its.figure and its.instance
    }

    def price(instance: str, purchase: str) -> float | None:
        if instance not in rows:
            # No GPU machine: a gateway's is not in the plan either. What is no name of a type has no price.
            return None if " " in instance else 0.0
        if (instance, purchase) in stated:
            return stated[instance, purchase]
        offers = offers_of(market, rows[instance], region, cast("Purchase", purchase))
        return min((offer.usd_per_hour for offer in offers), default=None)

    whole = len(known) == len(spec.pools)
    return {"gateway_port": spec.gateway.port, "usd_per_hour": sum(known) if whole else None, "price": price}


@cache
def documented_to_replace(kind: str, key: str) -> bool:
    """Whether pulumi-aws says of a property that another value makes another resource.

    The engine has that from the provider's schema and tells it as a replacement; here the SDK's own words are read, for
    a provider that does not know. What they leave out is not guessed.
    """
    found = re.fullmatch(r"aws:(\w+)/\w+:(\w+)", kind)
    if not found:
        return False
    try:
        module = importlib.import_module(f"pulumi_aws.{found[1]}")
        arguments = getattr(module, f"{found[2]}Args")
    except (ImportError, AttributeError):
        return False
    for name, attribute in cast("dict[str, Any]", vars(arguments)).items():
        getter = attribute.fget if isinstance(attribute, property) else None
        if getter and key in (name, getattr(getter, "_pulumi_name", None)):
            return bool(_FORCES.search(inspect.getdoc(attribute) or ""))
    return False
