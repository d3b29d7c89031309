"""A plan as tables for a terminal of 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpuyard.plan.sizing.choose import Considered
from gpuyard.plan.sizing.figures import Figure, number
from gpuyard.plan.sizing.plan import Plan
from gpuyard.plan.sizing.room import Part

_NARROW = 80
_SHOWN = 6
"""So many considered machines of a pool are shown; --json has all."""


def tell(made: Plan, page: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else _NARROW)
    console.print(_nodes(made))
    console.print(_models(made))
    if any(pool.shares for pool in made.pools):
        console.print(_shares(made))
    for pool in made.pools:
        if pool.considered:
            console.print(_considered(pool.name, pool.considered))
    if any(model.traffic for model in made.models):
        console.print(_traffic(made))
    if any(model.starts for model in made.models):
        console.print(_starts(made))
    console.print(_bill(made))
    if any(model.money and model.money.break_even for model in made.models):
        console.print(_break_even(made))
    assumed = [f"{item.name} {number(item.figure.value)}" for item in made.assumptions if not item.stated]
    typer.echo(f"assumed, not stated by the fleet: {', '.join(assumed)}")
    for finding in made.findings:
        typer.echo(str(finding))
    typer.echo("each figure's arithmetic and source: --json, or --html FILE")
    hint = f"; page: {page}" if page else ""
    typer.echo(f"fleet {made.fleet} is {made.verdict} as planned on {made.today}{hint}")


def _nodes(made: Plan) -> Table:
    table = _table("Nodes", "pool", "nodes", "GPUs each", "machine", "USD/h each", "GPUs used", "kW at most")
    for pool in made.pools:
        kilowatts = pool.power.pool_kilowatts if pool.power else None
        used = f"{pool.gpus_used} of {pool.gpus_per_node}"
        each = f"{pool.gpus_per_node} x {pool.gpu}"
        place = pool.instance or "-"
        if pool.usd_per_node_hour and pool.region:
            place += f" {pool.region} {pool.purchase}"
        table.add_row(pool.name, str(pool.nodes), each, place, _cell(pool.usd_per_node_hour), used, _cell(kilowatts))
    return table


def _models(made: Plan) -> Table:
    columns = (
        "model",
        "TP x copies a node",
        "weights GiB",
        "KV cache GiB",
        "longest at once",
        "tokens/s a copy",
        "USD/Mtok",
    )
    table = _table("Models", *columns)
    for model in made.models:
        memory = model.memory
        parts = {part.name: part for part in memory.parts} if memory else {}
        weights, cache = parts.get("weights"), parts.get("KV cache")
        rate = model.throughput
        table.add_row(
            model.name,
            f"{model.tensor_parallel_size} x {model.data_parallel_size}" if model.gpus_per_node else "no GPU",
            number(weights.gib) if weights else "-",
            _part(cache) if cache else "-",
            number(memory.max_concurrency) if memory else "-",
            f"{_cell(rate.tokens_per_second)} {rate.basis}" if rate else "-",
            _cell(model.money.usd_per_mtok) if model.money else "-",
        )
    return table


def _part(part: Part) -> str:
    spread = f" ({number(part.low)} to {number(part.high)})" if part.low < part.high else ""
    return number(part.gib) + spread


def _shares(made: Plan) -> Table:
    table = _table("Where what is paid goes", "pool", "no model", "spare", "upgrades", "idle", "served")
    for pool in made.pools:
        if parts := pool.shares:
            each = (parts.no_model, parts.spare, parts.upgrades, parts.idle, parts.served)
            table.add_row(pool.name, *(f"{part.value:.2%}" for part in each))
    return table


def _considered(pool: str, items: Sequence[Considered]) -> Table:
    table = _table(f"Considered for pool {pool}, not chosen", "what", "USD/h", "rule", "why")
    for item in items[:_SHOWN]:
        table.add_row(item.what, _cell(item.usd_per_node_hour), item.rule, item.why)
    if len(items) > _SHOWN:
        table.add_row(f"and {len(items) - _SHOWN} more", "", "", "--json has all")
    return table


def _traffic(made: Plan) -> Table:
    table = _table("Between GPUs", "model", "parallel", "over", "kB a token", "tokens/s lost", "share lost")
    for model in made.models:
        own = [way for way in model.traffic if not way.over.startswith("infiniband-")]
        # A machine whose network is not told is shown with the generations of InfiniBand, the others in --json alone.
        for way in own if len(own) > 1 else model.traffic:
            lost = way.share_lost
            share = f"{lost.value:.1%} ({lost.low or 0:.1%} to {lost.high or 0:.1%})"
            kilobytes = number(way.bytes_per_token.value / 1000)
            table.add_row(model.name, way.parallel, way.over, kilobytes, _cell(way.tokens_per_second_lost), share)
    return table


def _starts(made: Plan) -> Table:
    table = _table("Cold start", "model", "weights on", "read, s", "to the first answer, s", "meets the goal")
    for model in made.models:
        for start in model.starts:
            meets = {True: "yes", False: "no", None: "perhaps"}[start.meets_goal]
            table.add_row(model.name, start.tier, _cell(start.load_seconds), _cell(start.start_seconds), meets)
    return table


def _bill(made: Plan) -> Table:
    table = _table("Bill", "what", "USD/h", "how")
    for line in made.bill.lines:
        # Where a price was read stands behind the colon, and in --json.
        table.add_row(line.what, _cell(line.usd_per_hour), line.usd_per_hour.how.partition(": ")[0])
    for pool in made.unpriced:
        table.add_row(f"pool {pool}", "unknown", "no price: COST-PRICE")
    total = made.bill
    month, year = number(total.usd_per_month.value), number(total.usd_per_year.value)
    table.add_row("together", _cell(total.usd_per_hour), f"{month} USD a month, {year} USD a year")
    return table


def _break_even(made: Plan) -> Table:
    table = _table("Break-even", "model", "API", "its USD/Mtok", "from Mtok/month", "of capacity", "pays as planned")
    for model in made.models:
        for item in model.money.break_even if model.money else ():
            pays = {True: "yes", False: "no", None: "perhaps"}[item.pays]
            share = f"{item.share_of_capacity.value:.0%}"
            table.add_row(model.name, item.api, _cell(item.usd_per_mtok), _cell(item.mtok_per_month), share, pays)
    return table


def _cell(figure: Figure | None) -> str:
    """A figure in a table: ? marks what is unverified."""
    if figure is None:
        return "-"
    spread = f" ({number(figure.low)} to {number(figure.high)})" if figure.low is not None and figure.high else ""
    return f"{number(figure.value)}{'' if figure.verified else '?'}{spread}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
