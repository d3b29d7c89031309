"""A run as one page for people who were not there: it needs no network, no script and nothing beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from gpuyard.upgrade.runs import Run, Stay, Walk, out_of_rotation

COLOURS = {
    "upgrade-required": "#d8dee6",
    "drain-required": "#7aa6d6",
    "driver-install-required": "#e8a33d",
    "service-stop-required": "#e8a33d",
    "reboot-required": "#e8a33d",
    "validation-required": "#b08fd8",
    "uncordon-required": "#6fc3c0",
    "soak-required": "#a9cf7a",
    "rollback-required": "#d9534f",
    "upgrade-done": "#3c9a5f",
    "rollback-done": "#8a6d3b",
    "rollback-failed": "#7b1e1a",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d8dee6; vertical-align: top }
.bar { position: relative; height: 1.2rem; background: #f3f5f8; min-width: 24rem }
.bar span { position: absolute; top: 0; bottom: 0; min-width: 2px }
.key span { display: inline-block; width: .9rem; height: .9rem; margin: 0 .3rem 0 .9rem; vertical-align: -2px }
.done { color: #2c7a49 } .halted, .refused { color: #b3312c } .open { color: #9a6a12 }
code { font-size: 13px; overflow-wrap: anywhere }
"""


def html(run: Run, now: datetime | None = None) -> str:
    """The page. `now` ends the bar of what has not ended; without it, this moment."""
    until = run.ended or now or datetime.now(UTC)
    result = run.result or "open"
    what = f"{'Back' if run.asked.get('back') else run.kind.capitalize()} to {run.target} on {run.fleet}"
    facts = {
        "run": run.id,
        "result": result,
        "begun": _time(run.begun),
        "ended": _time(run.ended) if run.ended else "not yet",
        "took": _length((until - run.begun).total_seconds()),
        "by": ", ".join(run.operators),
        "asked": _policy(run),
        "last line of the record (SHA-256)": run.head,
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{_code(told)}</td></tr>" for name, told in facts.items())
    states = dict.fromkeys(stay.state for walk in run.walks.values() for stay in walk.stays)
    key = "".join(f'<span style="background:{COLOURS.get(state, "#888")}"></span>{escape(state)}' for state in states)
    walks = "".join(_walk(walk, run.begun, until) for walk in run.walks.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(run.id)}</title><style>{STYLE}</style></head><body>
<h1>{escape(what)}: <span class="{result}">{escape(result)}</span></h1>
<table>{rows}</table>
<h2>Nodes</h2>
<p class="key">{key}</p>
<table><tr><th>node</th><th>from, to</th><th>{_time(run.begun)} to {_time(until)}</th><th>out of rotation</th>
<th>state</th></tr>{walks}</table>
<h2>Proofs</h2>
<table><tr><th>node</th><th>answers held against those of the driver before, one line a model</th></tr>
{"".join(_proofs(walk) for walk in run.walks.values())}</table>
</body></html>
"""


def _walk(walk: Walk, begun: datetime, until: datetime) -> str:
    whole = max((until - begun).total_seconds(), 0.001)
    # What came to rest is a mark at its end, so that nobody takes it for time out of service.
    bars = "".join(_bar(stay, begun, until, whole) for stay in walk.stays)
    told = f"{escape(walk.state)}" + (f"<br>{escape(walk.reason)}" if walk.reason else "")
    again = f" (attempt {walk.attempts})" if walk.attempts > 1 else ""
    return (
        f"<tr><td>{escape(walk.node)}{again}</td><td>{escape(walk.previous)} → {escape(walk.target)}</td>"
        f'<td><div class="bar">{bars}</div></td><td>{_length(out_of_rotation(walk))}</td><td>{told}</td></tr>'
    )


def _bar(stay: Stay, begun: datetime, until: datetime, whole: float) -> str:
    start = (stay.begun - begun).total_seconds() / whole * 100
    ended = stay.ended or until
    width = max((ended - stay.begun).total_seconds(), 0) / whole * 100
    title = f"{stay.state}, {_length((ended - stay.begun).total_seconds())}"
    colour = COLOURS.get(stay.state, "#888")
    style = f"left:{start:.2f}%;width:{width:.2f}%;background:{colour}"
    return f'<span style="{style}" title="{escape(title)}"></span>'


def _proofs(walk: Walk) -> str:
    found = [", ".join(f"{name} {value}" for name, value in answer.items()) for answer in walk.proof.get("answers", [])]
    return "".join(f"<tr><td>{escape(walk.node)}</td><td>{escape(line)}</td></tr>" for line in found)


def _policy(run: Run) -> str:
    asked = {**run.asked.get("policy", {}), **{name: run.asked[name] for name in ("limit",) if run.asked.get(name)}}
    return ", ".join(f"{name} {value}" for name, value in asked.items())


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _length(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
