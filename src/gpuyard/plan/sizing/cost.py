"""What a fleet costs an hour, what a million tokens that were served cost, and from which volume an API costs more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from gpuyard.catalog.market import ApiPrice, Market, Price
from gpuyard.catalog.rows import Instance
from gpuyard.plan.sizing.figures import GB, GIB, Figure, Ground, number
from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Fleet, Pool
from gpuyard.spec.planning import Purchase

_MINUTES_PER_YEAR = 365 * 24 * 60


class Line(Closed):
    """One part of the bill."""

    what: str
    usd_per_hour: Figure


class Shares(Closed):
    """Where a pool's paid capacity goes. The parts add up to 1."""

    no_model: Figure
    """GPUs that no model runs on."""
    spare: Figure
    upgrades: Figure
    idle: Figure
    """In service, and not asked for."""
    served: Figure


class BreakEven(Closed):
    """A fleet, or one model of it, against one API."""

    api: str
    usd_per_mtok: Figure
    """What the API asks for a million tokens of the same mix of prompts and answers."""
    mtok_per_month: Figure
    """From this volume on the fleet costs less."""
    share_of_capacity: Figure
    """That volume as a share of what the nodes in service can serve; above 1: never."""
    pays: bool | None
    """At the utilisation of the plan; None: it depends on which end of the interval of the throughput holds."""


class Served(Closed):
    """The money of one model."""

    usd_per_hour: Figure
    tokens_per_second_capacity: Figure
    """Answer tokens of all copies in service, all together."""
    mtok_per_month: Figure
    """Tokens served, prompts and answers, at the stated utilisation."""
    usd_per_mtok: Figure
    """For each million tokens served, prompts and answers."""
    usd_per_mtok_answered: Figure
    """For each million answer tokens served, prompts for nothing."""
    break_even: tuple[BreakEven, ...]


class Bill(Closed):
    """The money of the whole fleet."""

    lines: tuple[Line, ...]
    usd_per_hour: Figure
    usd_per_month: Figure
    usd_per_year: Figure


@dataclass(frozen=True, slots=True)
class NodePrice:
    """What one node costs an hour; `figure` is None where nobody says."""

    figure: Figure | None
    instance: Instance | None
    purchase: Purchase
    region: str | None
    row: Price | None


def node_price(fleet: Fleet, pool: Pool, market: Market, instances: Sequence[Instance]) -> NodePrice:
    """By what the fleet states, else by the catalog: the named machine, or the cheapest that has the pool's GPUs."""
    planning, machine = fleet.planning, pool.machine
    purchase: Purchase = (machine and machine.purchase) or (planning and planning.purchase) or "on-demand"
    region = (machine and machine.region) or (planning and planning.region)
    named = machine.instance if machine else None
    able = [
        row
        for row in instances
        if (row.instance == named if named else fleet.provider == "aws" and row.provider == "aws")
        and row.gpu == pool.gpu
        and row.gpus == pool.gpus_per_node
    ]
    offers = [(row, price) for row in able for price in offers_of(market, row, region, purchase)]
    best = min(offers, key=lambda offer: offer[1].usd_per_hour, default=None)
    instance = best[0] if best else next(iter(able), None)
    if machine and machine.usd_per_hour is not None:
        figure = Figure(value=machine.usd_per_hour, unit="USD/h", how="machine.usd_per_hour", verified=True)
        return NodePrice(figure, instance, purchase, region, None)
    if fleet.provider == "lab":
        how = "the lab's machines are this box"
        return NodePrice(Figure(value=0, unit="USD/h", how=how, verified=True), None, purchase, region, None)
    if best is None:
        return NodePrice(None, instance, purchase, region, None)
    return NodePrice(priced(best[1]), best[0], purchase, region or best[1].region, best[1])


def offers_of(market: Market, instance: Instance, region: str | None, purchase: Purchase) -> list[Price]:
    """The prices of a machine that are of this purchase, in this region where one is asked for."""
    wanted = (instance.provider, instance.instance, purchase)
    return [
        row
        for row in market.prices
        if (row.provider, row.instance, row.purchase) == wanted and (region is None or row.region in (region, "any"))
    ]


def priced(row: Price) -> Figure:
    how = f"{row.instance}, {row.region}, {row.purchase}, {row.as_of}: {row.source}"
    return Figure(value=row.usd_per_hour, unit="USD/h", how=how, verified=row.verified)


def shares(ground: Ground, *, nodes: int, spare: int, used: int, gpus: int, utilisation: float) -> Shares:
    """Where what is paid goes. `used` of `gpus` GPUs of a node have a model."""
    out = dip(ground)
    with_model = used / gpus
    standing = with_model * spare / nodes
    left = with_model - standing
    dips = left * out
    idle = (left - dips) * (1 - utilisation)
    known = ground.verified("utilisation", "spare_nodes", "upgrades_per_year", "minutes_per_upgrade")

    def part(value: float, how: str) -> Figure:
        return Figure(value=value, unit="of paid capacity", how=how, verified=known)

    minutes = f"{number(ground.value('upgrades_per_year'))} x {number(ground.value('minutes_per_upgrade'))} min / year"
    return Shares(
        no_model=part(1 - with_model, f"1 - {used} / {gpus} GPUs"),
        spare=part(standing, f"{spare} / {nodes} nodes x {number(with_model)}"),
        upgrades=part(dips, f"{number(left)} x {out:.3g}, {minutes}"),
        idle=part(idle, f"({number(left)} - {dips:.3g}) x (1 - utilisation {number(utilisation)})"),
        served=part(left - dips - idle, f"({number(left)} - {dips:.3g}) x utilisation {number(utilisation)}"),
    )


def dip(ground: Ground) -> float:
    """Share of its time that a node is out for upgrades."""
    return min(1.0, ground.value("upgrades_per_year") * ground.value("minutes_per_upgrade") / _MINUTES_PER_YEAR)


def other_lines(fleet: Fleet, ground: Ground, weights_gib: Sequence[float], known: bool) -> list[Line]:
    """Gateway, staff, storage and transfer: what stands beside the nodes. A line of nothing is left out."""
    hours = ground.value("hours_per_month")
    lines: list[Line] = []

    def line(what: str, value: float, how: str, verified: bool) -> None:
        if value:
            lines.append(Line(what=what, usd_per_hour=Figure(value=value, unit="USD/h", how=how, verified=verified)))

    gateways, each = fleet.gateway.nodes, ground.value("gateway_usd_per_hour")
    how = f"{gateways} x {number(each)} USD/h"
    line("gateway", gateways * each, how, ground.verified("gateway_usd_per_hour"))
    people, salary = ground.value("full_time_equivalents"), ground.value("usd_per_year")
    how = f"{number(people)} people x {number(salary)} USD / (12 x {number(hours)} h)"
    line("staff", people * salary / (12 * hours), how, ground.verified("full_time_equivalents", "usd_per_year"))
    storage = fleet.planning.storage if fleet.planning else None
    if tier := next((row for row in ground.market.storage_tiers if storage and row.tier == storage.tier), None):
        copies = ground.value("model_revisions")
        gb = sum(weights_gib) * GIB / GB * copies
        how = f"{number(gb)} GB ({number(copies)} revisions)"
        if storage and storage.tib:
            gb, how = storage.tib * 1024 * GIB / GB, f"{number(storage.tib)} TiB"
        how = f"{how} x {number(tier.usd_per_gb_month)} USD / {number(hours)} h; {tier.source}"
        line(f"storage {tier.tier}", gb * tier.usd_per_gb_month / hours, how, known and tier.verified)
    sent, each = ground.value("transfer_gb_per_month"), ground.value("transfer_usd_per_gb")
    how = f"{number(sent)} GB x {number(each)} USD / {number(hours)} h"
    line("transfer", sent * each / hours, how, ground.verified("transfer_gb_per_month", "transfer_usd_per_gb"))
    return lines


def bill(lines: Sequence[Line], ground: Ground) -> Bill:
    """The sum of its lines."""
    total = fsum(line.usd_per_hour.value for line in lines)
    known = all(line.usd_per_hour.verified for line in lines)
    hours = ground.value("hours_per_month")

    def amount(factor: float, unit: str, how: str) -> Figure:
        return Figure(value=total * factor, unit=unit, how=how, verified=known)

    how = " + ".join(number(line.usd_per_hour.value) for line in lines) or "nothing"
    return Bill(
        lines=tuple(lines),
        usd_per_hour=amount(1, "USD/h", how if len(lines) <= 8 else f"the sum of {len(lines)} lines"),
        usd_per_month=amount(hours, "USD/month", f"{number(total)} x {number(hours)} h"),
        usd_per_year=amount(12 * hours, "USD/year", f"{number(total)} x 12 x {number(hours)} h"),
    )


def served(
    ground: Ground,
    *,
    usd_per_hour: Figure,
    capacity: Figure,
    utilisation: float,
    apis: Sequence[ApiPrice],
) -> Served:
    """The money of a model whose copies in service can answer `capacity` tokens a second."""
    hours = ground.value("hours_per_month")
    asked, given = ground.value("input_tokens"), ground.value("output_tokens")
    mix = (asked + given) / given
    low, high = capacity.low or capacity.value, capacity.high or capacity.value
    rates = (low, capacity.value, high)
    scale = mix * 3600 * hours / 1e6

    def month(rate: float) -> float:
        return rate * utilisation * scale

    volume = Figure(
        value=month(capacity.value),
        low=month(low) if capacity.low else None,
        high=month(high) if capacity.high else None,
        unit="Mtok/month",
        how=f"{number(capacity.value)} tokens/s x {number(utilisation)} x ({number(asked)} + {number(given)}) / "
        f"{number(given)} x 3600 x {number(hours)} h / 10^6",
        verified=capacity.verified and ground.verified("utilisation", "input_tokens", "output_tokens"),
    )
    monthly = usd_per_hour.value * hours
    known = volume.verified and usd_per_hour.verified
    how = f"{number(usd_per_hour.value)} USD/h x {number(hours)} h / {number(volume.value)} Mtok"

    def per(factor: float, how: str) -> Figure:
        ends = [monthly * factor / month(rate) for rate in (capacity.value, high, low)]
        spread = {"low": ends[1], "high": ends[2]} if capacity.low else {}
        return Figure(value=ends[0], unit="USD/Mtok", how=how, verified=known, **spread)

    return Served(
        usd_per_hour=usd_per_hour,
        tokens_per_second_capacity=capacity,
        mtok_per_month=volume,
        usd_per_mtok=per(1, how),
        usd_per_mtok_answered=per(mix, f"{how} x ({number(asked)} + {number(given)}) / {number(given)}"),
        break_even=tuple(break_even(ground, usd_per_hour, rates, utilisation, api) for api in apis),
    )


def break_even(
    ground: Ground, usd_per_hour: Figure, rates: tuple[float, float, float], utilisation: float, api: ApiPrice
) -> BreakEven:
    """From which volume the hourly cost is less than the API's. `rates`: answer tokens/s, low, middle, high."""
    asked, given, hours = ground.value("input_tokens"), ground.value("output_tokens"), ground.value("hours_per_month")
    blended = (asked * api.input_usd_per_mtok + given * api.output_usd_per_mtok) / (asked + given)
    monthly = usd_per_hour.value * hours
    volume = monthly / blended
    ends = [volume / (rate * (asked + given) / given * 3600 * hours / 1e6) for rate in rates]
    known = usd_per_hour.verified and api.verified and ground.verified("input_tokens", "output_tokens")
    return BreakEven(
        api=f"{api.provider}/{api.model}",
        usd_per_mtok=Figure(
            value=blended,
            unit="USD/Mtok",
            how=f"({number(asked)} x {api.input_usd_per_mtok} + {number(given)} x {api.output_usd_per_mtok}) / "
            f"({number(asked)} + {number(given)}), {api.as_of}: {api.source}",
            verified=api.verified and ground.verified("input_tokens", "output_tokens"),
        ),
        mtok_per_month=Figure(
            value=volume,
            unit="Mtok/month",
            how=f"{number(usd_per_hour.value)} USD/h x {number(hours)} h / {number(blended)} USD/Mtok",
            verified=known,
        ),
        share_of_capacity=Figure(
            value=ends[1],
            low=ends[2] if rates[0] < rates[2] else None,
            high=ends[0] if rates[0] < rates[2] else None,
            unit="of capacity",
            how=f"{number(volume)} Mtok / what {number(rates[1])} answer tokens/s make in a month",
            verified=False,
        ),
        pays=True if ends[0] <= utilisation else False if ends[2] > utilisation else None,
    )
