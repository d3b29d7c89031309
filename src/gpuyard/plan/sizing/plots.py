"""Plots as SVG: a bar of memory for each model, cost against utilisation, break-even. No script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

from gpuyard.plan.sizing.figures import number
from gpuyard.plan.sizing.parts import ModelPlan
from gpuyard.plan.sizing.room import Memory

COLOURS = ("#4878a8", "#d8873b", "#6a9f58", "#a05d9c", "#8c8c8c", "#c14f4f", "#5fb0ac", "#b8a13e")
_WIDTH, _HEIGHT = 640.0, 260.0
_LEFT, _BOTTOM, _TOP, _RIGHT = 70.0, 40.0, 14.0, 16.0

Points = Sequence[tuple[float, float]]


def memory_bar(name: str, memory: Memory) -> str:
    """One GPU's memory under a model: its parts, what the engine may take, and what the board has."""
    width, scale = 620.0, 620.0 / max(memory.total_gib, *(sum(part.gib for part in memory.parts),))
    at, boxes = 0.0, ""
    for index, part in enumerate(memory.parts):
        long = max(part.gib, 0.0) * scale
        told = f"{part.name}: {number(part.gib)} GiB ({number(part.low)} to {number(part.high)})"
        boxes += (
            f'<rect x="{at:.1f}" y="18" width="{long:.1f}" height="26" fill="{COLOURS[index % len(COLOURS)]}">'
            f"<title>{escape(told)}</title></rect>"
        )
        at += long
    limit = memory.requested_gib * scale
    edge = memory.total_gib * scale
    return (
        f'<svg viewBox="0 0 {width + 10:.0f} 62" role="img" aria-label="{escape(f"memory of {memory.gpu}, {name}")}">'
        f'<rect x="0" y="18" width="{edge:.1f}" height="26" fill="#eef1f5"/>{boxes}'
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="12" y2="50" stroke="#1c2430" stroke-dasharray="3 2"/>'
        f'<text x="{limit:.1f}" y="10" text-anchor="end">may take {number(memory.requested_gib)} GiB</text>'
        f'<text x="{edge:.1f}" y="60" text-anchor="end">{number(memory.total_gib)} GiB</text></svg>'
    )


def cost_against_utilisation(model: ModelPlan, utilisation: float) -> str:
    """USD for a million tokens served, by utilisation, between the ends of the throughput's interval, and each API."""
    money = model.money
    assert money  # noqa: S101 - the page has asked
    steps = [share / 100 for share in range(5, 101, 5)]
    at_one = money.usd_per_mtok.value * utilisation
    low, high = (
        (end if end is not None else money.usd_per_mtok.value) * utilisation
        for end in (money.usd_per_mtok.low, money.usd_per_mtok.high)
    )
    curve = [(share, at_one / share) for share in steps]
    band = [(share, high / share) for share in steps] + [(share, low / share) for share in reversed(steps)]
    levels = [(item.api, item.usd_per_mtok.value) for item in money.break_even]
    bottom = min([low, *(level for _, level in levels if level > 0)]) / 1.5
    frame = _Frame(0.0, 1.0, bottom, high / steps[0] * 1.2)
    title = f"USD for a million tokens served of {model.name}, by utilisation"
    body = frame.polygon(band) + frame.line(curve, "#4878a8")
    body += frame.upright(utilisation, f"planned {utilisation:.0%}")
    for index, (api, level) in enumerate(levels):
        body += frame.level(level, api, api_colour(index))
    return frame.svg(
        title, body, "utilisation", "USD/Mtok", [(share / 10, f"{share * 10}%") for share in range(0, 11, 2)]
    )


def break_even_plot(model: ModelPlan) -> str:
    """USD a month by volume: the fleet's is flat up to what it can serve, each API's rises with the volume."""
    money = model.money
    assert money  # noqa: S101 - the page has asked
    month = money.break_even[0].mtok_per_month.value * money.break_even[0].usd_per_mtok.value
    most = max(money.mtok_per_month.value * 3, *(min(item.mtok_per_month.value, 1e7) for item in money.break_even))
    least = max(min(item.mtok_per_month.value for item in money.break_even) / 30, most / 1e4)
    volumes = [least * (most * 1.5 / least) ** (step / 40) for step in range(41)]
    prices = [item.usd_per_mtok.value for item in money.break_even]
    top = max(month * 3, max(prices) * month / min(prices) / 10)
    frame = _Frame(least, most * 1.5, max(min(prices) * least, month / 1e3), top, log_x=True)
    body = frame.line([(volumes[0], month), (volumes[-1], month)], "#4878a8")
    body += frame.upright(money.mtok_per_month.value, "served as planned")
    all_of_it = money.break_even[0].mtok_per_month.value / money.break_even[0].share_of_capacity.value
    body += frame.upright(all_of_it, "all it can serve", lower=True)
    for index, item in enumerate(money.break_even):
        colour = api_colour(index)
        line = [(volume, volume * item.usd_per_mtok.value) for volume in volumes]
        body += frame.line([point for point in line if frame.bottom <= point[1] <= frame.top], colour)
        body += frame.dot(item.mtok_per_month.value, month, colour, f"{item.api}: {item.mtok_per_month}")
    ticks = [(10.0**power, number(10.0**power)) for power in range(ceil(log10(least)), floor(log10(most * 1.5)) + 1)]
    return frame.svg(f"USD a month of {model.name} by volume", body, "Mtok a month", "USD/month", ticks)


def api_colour(index: int) -> str:
    """The colour of an API's line, in both plots and in their key."""
    return COLOURS[(index + 1) % len(COLOURS)]


class _Frame:
    """Axes: y is logarithmic, x is where asked."""

    def __init__(self, left: float, right: float, bottom: float, top: float, *, log_x: bool = False) -> None:
        self.left, self.right, self.bottom, self.top, self.log_x = left, right, bottom, top, log_x

    def x(self, value: float) -> float:
        share = (
            log10(value / self.left) / log10(self.right / self.left)
            if self.log_x
            else (value - self.left) / (self.right - self.left)
        )
        return _LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = log10(max(value, self.bottom) / self.bottom) / log10(self.top / self.bottom)
        return _HEIGHT - _BOTTOM - min(share, 1.0) * (_HEIGHT - _BOTTOM - _TOP)

    def points(self, points: Points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def line(self, points: Points, colour: str) -> str:
        return f'<polyline points="{self.points(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def polygon(self, points: Points) -> str:
        return f'<polygon points="{self.points(points)}" fill="#4878a8" fill-opacity="0.18"/>'

    def upright(self, x: float, told: str, *, lower: bool = False) -> str:
        at = self.x(x)
        # Near the right edge the words stand to the left of their line.
        beside, anchor = (at - 4, "end") if at > 0.75 * _WIDTH else (at + 4, "start")
        return (
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#1c2430" '
            f'stroke-dasharray="3 2"/><text x="{beside:.1f}" y="{_TOP + (24 if lower else 10)}" '
            f'text-anchor="{anchor}">{escape(told)}</text>'
        )

    def level(self, y: float, told: str, colour: str) -> str:
        at = self.y(y)
        return (
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(f'{told}: {number(y)} USD/Mtok')}</title></line>"
        )

    def dot(self, x: float, y: float, colour: str, told: str) -> str:
        if not self.left <= x <= self.right:
            return ""
        return (
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4" fill="{colour}">'
            f"<title>{escape(told)}</title></circle>"
        )

    def svg(self, title: str, body: str, x_name: str, y_name: str, ticks: Sequence[tuple[float, str]]) -> str:
        floor_at = _HEIGHT - _BOTTOM
        marks = "".join(
            f'<line x1="{self.x(at):.1f}" x2="{self.x(at):.1f}" y1="{floor_at}" y2="{floor_at + 4}" stroke="#888"/>'
            f'<text x="{self.x(at):.1f}" y="{floor_at + 16}" text-anchor="middle">{escape(told)}</text>'
            for at, told in ticks
        )
        powers = range(floor(log10(self.bottom)), floor(log10(self.top)) + 1)
        # With many decades each has one mark, with few also its 2 and 5.
        steps = (1, 2, 5) if len(powers) <= 3 else (1,)
        levels = [step * 10.0**power for power in powers for step in steps]
        marks += "".join(
            f'<line x1="{_LEFT - 4}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e3e7ed"/>'
            f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{told}</text>'
            for at, told in ((self.y(level), number(level)) for level in levels if self.bottom <= level <= self.top)
        )
        axes = f"{_LEFT},{_TOP} {_LEFT},{floor_at} {_WIDTH - _RIGHT},{floor_at}"
        return (
            f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(title)}">{marks}'
            f'<polyline points="{axes}" fill="none" stroke="#888"/>'
            f'{body}<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 6:.0f}" text-anchor="middle">{escape(x_name)}</text>'
            f'<text x="12" y="{_TOP + 8}" class="axis">{escape(y_name)}</text></svg>'
        )
