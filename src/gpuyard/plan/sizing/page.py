"""A plan as one page for people who decide: it needs no network, no script and nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from gpuyard.plan.sizing.figures import Figure, number
from gpuyard.plan.sizing.parts import ModelPlan, PoolPlan
from gpuyard.plan.sizing.plan import Plan
from gpuyard.plan.sizing.plots import COLOURS, api_colour, break_even_plot, cost_against_utilisation, memory_bar
from gpuyard.plan.sizing.room import CPU

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d8dee6; vertical-align: top }
details { font-size: 12px; color: #4a5568; overflow-wrap: anywhere }
svg { width: 100%; height: auto; max-width: 46rem; display: block; margin: .6rem 0 }
svg text { font: 10px system-ui, sans-serif; fill: #1c2430 }
.key span { display: inline-block; width: .9rem; height: .9rem; margin: 0 .3rem 0 .9rem; vertical-align: -2px }
.unsure { color: #9a6a12 } .green { color: #2c7a49 } .amber { color: #9a6a12 } .red { color: #b3312c }
code { font-size: 13px; overflow-wrap: anywhere }
@media (max-width: 50rem) {
  table { display: block; overflow-x: auto }
  td { min-width: 7rem }
}
"""


def html(plan: Plan) -> str:
    """The page."""
    facts = {
        "fleet": plan.fleet,
        "provider": plan.provider,
        "planned on": plan.today,
        "digest of the spec": plan.spec_digest,
        "nodes": str(sum(pool.nodes for pool in plan.pools)),
        "models": str(len(plan.models)),
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(told)}</code></td></tr>" for name, told in facts.items()
    )
    bill = "".join(_row(line.what, line.usd_per_hour) for line in plan.bill.lines)
    bill += "".join(_row(f"together, {figure.unit}", figure) for figure in _totals(plan))
    bill += "".join(f"<tr><td>pool {escape(name)}</td><td>no price</td></tr>" for name in plan.unpriced)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Plan of {escape(plan.fleet)}</title>
<style>{STYLE}</style></head>
<body>
<h1>Plan of fleet {escape(plan.fleet)}: <span class="{plan.verdict}">{plan.verdict}</span></h1>
<p>Open a figure to see its arithmetic and source. <span class="unsure">Figures in this colour are unverified</span>:
a part of them is assumed, remembered or reckoned, not measured.</p>
<table>{rows}</table>
{_findings(plan)}
<h2>Bill</h2><table><tr><th>what</th><th>figure</th></tr>{bill}</table>
{"".join(_pool(pool) for pool in plan.pools)}
{"".join(_model(plan, model) for model in plan.models)}
{"".join(_considered(pool) for pool in plan.pools)}
<h2>What the plan rests on</h2>
<table><tr><th>figure</th><th>value</th><th>stated by the fleet</th></tr>{"".join(_assumed(plan))}</table>
</body></html>
"""


def _totals(plan: Plan) -> tuple[Figure, Figure, Figure]:
    return plan.bill.usd_per_hour, plan.bill.usd_per_month, plan.bill.usd_per_year


def _assumed(plan: Plan) -> Iterable[str]:
    for item in plan.assumptions:
        told = f"{escape(item.name)}<br>{escape(item.says)}"
        yield f"<tr><td>{told}</td><td>{_figure(item.figure)}</td><td>{'yes' if item.stated else 'no'}</td></tr>"


def _findings(plan: Plan) -> str:
    if not plan.findings:
        return ""
    rows = "".join(
        f'<tr><td class="{finding.level}">{escape(finding.rule)}</td><td>{escape(finding.what)}</td>'
        f"<td>{escape(finding.have)}</td><td>{escape(finding.need)}</td><td>{escape(finding.change)}</td></tr>"
        for finding in plan.findings
    )
    head = "<tr><th>rule</th><th>where</th><th>has</th><th>needs</th><th>smallest change</th></tr>"
    return f"<h2>Findings</h2><table>{head}{rows}</table>"


def _pool(pool: PoolPlan) -> str:
    machine = f"{pool.nodes} nodes with {pool.gpus_per_node} x {pool.gpu}"
    if pool.instance:
        machine += f", {pool.instance} {pool.region or ''} {pool.purchase}"
    rows = [
        ("machines", escape(machine)),
        ("GPUs with a model", f"{pool.gpus_used} of {pool.gpus_per_node} in each node"),
    ]
    figures = [("USD for a node and hour", pool.usd_per_node_hour)]
    if shares := pool.shares:
        parts = ("no_model", "spare", "upgrades", "idle", "served")
        figures += [(f"of what is paid: {name.replace('_', ' ')}", getattr(shares, name)) for name in parts]
    if pool.cache:
        figures += [("local NVMe needed", pool.cache.needed_gb), ("local NVMe there", pool.cache.local_gb)]
    if pool.power:
        figures += [
            ("power of a node at most", pool.power.node_watts),
            ("power of the pool at most", pool.power.pool_kilowatts),
            ("thermal margin", pool.power.thermal_margin_c),
            ("power of a rack at most", pool.power.rack_watts),
            ("left in the rack", pool.power.rack_margin_watts),
            ("limit of the GPUs that the rack carries", pool.power.throttled_share),
        ]
    rows += [(name, _figure(figure)) for name, figure in figures if figure]
    body = "".join(f"<tr><th>{name}</th><td>{told}</td></tr>" for name, told in rows)
    return f"<h2>Pool {escape(pool.name)}</h2><table>{body}</table>"


def _considered(pool: PoolPlan) -> str:
    rows = "".join(
        f"<tr><td>{escape(item.what)}</td><td>{_figure(item.usd_per_node_hour)}</td><td>{_figure(item.usd_per_mtok)}</td>"
        f"<td>{escape(item.rule)}</td><td>{escape(item.why)}</td></tr>"
        for item in pool.considered
    )
    if not rows:
        return ""
    head = "<tr><th>what</th><th>node</th><th>busy all the time</th><th>rule</th><th>why</th></tr>"
    return f"<h2>Considered for pool {escape(pool.name)}, not chosen</h2><table>{head}{rows}</table>"


def _model(plan: Plan, model: ModelPlan) -> str:
    made = f"<h2>Model {escape(model.name)}</h2><p><code>{escape(model.source)}</code> in pool {escape(model.pool)}, "
    made += f"tensor_parallel_size {model.tensor_parallel_size}, {model.data_parallel_size} copies a node</p>"
    if model.memory:
        whose = "the machine, without a GPU" if model.memory.gpu == CPU else "one GPU"
        made += f"<h3>Memory of {whose}</h3>{memory_bar(model.name, model.memory)}{_key(model)}"
    if model.throughput:
        rate = model.throughput
        made += f"<p>Answer tokens of one copy, {rate.basis}: {_figure(rate.tokens_per_second)}</p>"
    if model.traffic:
        rows = [
            (
                way.parallel,
                escape(way.over),
                _figure(way.bytes_per_token),
                _figure(way.tokens_per_second_lost),
                _figure(way.share_lost),
            )
            for way in model.traffic
        ]
        head = ("parallel", "over", "bytes a token and GPU", "tokens/s lost", "share")
        made += f"<h3>Between GPUs</h3>{_table(head, rows)}"
    if model.starts:
        meets = {True: "yes", False: "no", None: "perhaps"}
        rows = [
            (escape(start.tier), _figure(start.load_seconds), _figure(start.start_seconds), meets[start.meets_goal])
            for start in model.starts
        ]
        made += f"<h3>Cold start</h3>{_table(('weights on', 'read', 'to the first answer', 'meets the goal'), rows)}"
    if model.money:
        made += _money(plan, model)
    return made


def _money(plan: Plan, model: ModelPlan) -> str:
    money = model.money
    assert money  # noqa: S101 - the caller has asked
    figures = (
        ("its share of the bill", money.usd_per_hour),
        ("capacity, answer tokens", money.tokens_per_second_capacity),
        ("tokens served", money.mtok_per_month),
        ("for a million tokens served", money.usd_per_mtok),
        ("for a million answer tokens served", money.usd_per_mtok_answered),
    )
    made = "<h3>Money</h3>" + _table(("what", "figure"), [(name, _figure(figure)) for name, figure in figures])
    utilisation = next(item.figure.value for item in plan.assumptions if item.name == "utilisation")
    if money.usd_per_mtok.value:
        made += cost_against_utilisation(model, utilisation) + _api_key(model)
    if not money.break_even:
        return made
    pays = {True: "yes", False: "no", None: "perhaps"}
    rows = [
        (
            escape(item.api),
            _figure(item.usd_per_mtok),
            _figure(item.mtok_per_month),
            _figure(item.share_of_capacity),
            pays[item.pays],
        )
        for item in money.break_even
    ]
    head = ("API", "it asks", "fleet costs less from", "of what it can serve", "pays as planned")
    plot = break_even_plot(model) + _api_key(model) if money.usd_per_mtok.value else ""
    return f"{made}<h3>Break-even</h3>{_table(head, rows)}{plot}"


def _key(model: ModelPlan) -> str:
    assert model.memory  # noqa: S101 - the caller has asked
    told = "".join(
        f'<span style="background:{COLOURS[index % len(COLOURS)]}"></span>{escape(part.name)} {number(part.gib)} GiB'
        for index, part in enumerate(model.memory.parts)
    )
    return f'<p class="key">{told}</p>'


def _api_key(model: ModelPlan) -> str:
    told = f'<span style="background:{COLOURS[0]}"></span>this fleet'
    for index, item in enumerate(model.money.break_even if model.money else ()):
        told += f'<span style="background:{api_colour(index)}"></span>{escape(item.api)}'
    return f'<p class="key">{told}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    rest = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{rest}</table>"


def _row(name: str, figure: Figure) -> str:
    return f"<tr><td>{escape(name)}</td><td>{_figure(figure)}</td></tr>"


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    style = "" if figure.verified else ' class="unsure"'
    return f"<span{style}>{escape(str(figure))}</span><details><summary>how</summary>{escape(figure.how)}</details>"
