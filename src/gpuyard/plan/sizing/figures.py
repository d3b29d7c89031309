"""Figures that say how they came about, and what is taken where a fleet states nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import field_serializer

from gpuyard.catalog.market import Assumption, Market
from gpuyard.catalog.rows import Row
from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Fleet

GIB = 2**30
GB = 10**9


class Figure(Closed):
    """A number with its unit, the arithmetic behind it, and whether all of that was read in a source with a name."""

    value: float
    unit: str
    how: str
    """The arithmetic, in numbers."""
    verified: bool
    low: float | None = None
    """With high the interval; both None: the number is exact, or no spread of its parts is known."""
    high: float | None = None

    @field_serializer("value", "low", "high")
    def _six_figures(self, number: float | None) -> float | None:
        # More than six significant figures would claim what no table says, and differ from one machine to the next.
        return None if number is None else float(f"{number:.6g}")

    def __str__(self) -> str:
        spread = (
            f" ({number(self.low)} to {number(self.high)})" if self.low is not None and self.high is not None else ""
        )
        unsure = "" if self.verified else " (unverified)"
        return f"{number(self.value)} {self.unit}{spread}{unsure}"


class Assumed(Closed):
    """A figure that the plan rests on."""

    name: str
    figure: Figure
    stated: bool
    """By the fleet; else it is the catalog's assumption."""
    says: str


@dataclass(frozen=True, slots=True)
class Ground:
    """What a plan stands on: the market's tables, and figures as the fleet states them or the catalog assumes."""

    market: Market
    stated: Mapping[str, float]
    rows: Mapping[str, Assumption]

    def value(self, name: str) -> float:
        return self.stated.get(name, self.rows[name].value)

    def verified(self, *names: str) -> bool:
        """What a fleet states is the operator's to answer for."""
        return all(name in self.stated or self.rows[name].verified for name in names)

    def figure(self, name: str) -> Figure:
        row = self.rows[name]
        if name in self.stated:
            return Figure(value=self.stated[name], unit=row.unit, how=f"planning.{name}", verified=True)
        how = f"assumed: {row.source}"
        return Figure(value=row.value, unit=row.unit, how=how, verified=row.verified, low=row.low, high=row.high)

    def assumed(self) -> tuple[Assumed, ...]:
        return tuple(
            Assumed(name=name, figure=self.figure(name), stated=name in self.stated, says=row.says)
            for name, row in self.rows.items()
        )


def ground_of(fleet: Fleet, market: Market) -> Ground:
    """What the fleet states, over the catalog's assumptions."""
    stated: dict[str, float] = {}
    if planning := fleet.planning:
        plain = planning.model_dump(exclude_none=True)
        stated = {name: float(value) for name, value in plain.items() if isinstance(value, int | float)}
        stated |= {name: float(value) for name, value in plain.get("staff", {}).items()}
    rows = {row.name: row for row in market.assumptions}
    if fleet.provider != "aws":
        own = {"value": 0.0, "low": 0.0, "verified": True, "source": "whoever has the hosts has the gateway's too"}
        rows["gateway_usd_per_hour"] = rows["gateway_usd_per_hour"].model_copy(update=own)
    if fleet.provider == "lab":
        own = {"value": 0.0, "low": 0.0, "verified": True, "source": "nobody looks after a lab"}
        rows["full_time_equivalents"] = rows["full_time_equivalents"].model_copy(update=own)
    return Ground(market, {name: value for name, value in stated.items() if name in rows}, rows)


def proven(*rows: Row | None) -> bool:
    """Whether every row is there and verified."""
    return all(row is not None and row.verified for row in rows)


def number(value: float) -> str:
    """A number as people read it: four figures at most, thousands apart."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.2e}"
    return f"{value:.4g}"
