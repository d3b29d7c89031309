"""Pools whose nodes have to stand together, by where their machines stand and where new ones would be made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpuyard.plan.judge import Finding
from gpuyard.provision import name_in
from gpuyard.provision.placement import is_close
from gpuyard.provision.protection import MACHINE, consent, machine_urn
from gpuyard.spec.fleet import Fleet, Pool

REFUSALS = ".gpuyard/refusals"
"""Folder of what zones refused, one file for each stack. Losing it costs one more refusal, nothing else."""


def standing(deployment: Mapping[str, Any]) -> dict[str, str]:
    """The zone of each machine that is there, by its node. `deployment`: of `pulumi stack export`."""
    rows: list[dict[str, Any]] = deployment.get("resources") or []
    machines = [row for row in rows if row["type"] == MACHINE and not row.get("delete")]
    zones: dict[str, str | None] = {
        name_in(row["urn"]): row.get("outputs", {}).get("availabilityZone") for row in machines
    }
    return {node: zone for node, zone in zones.items() if zone}


def close_pools_apart(
    fleet: Fleet, stack: str, there: Mapping[str, str], planned: Mapping[str, str] | None = None
) -> list[Finding]:
    """Pools whose nodes have to stand together and do not, or would not, after a zone had no more machines.

    `there`: the zone of each machine that is there. `planned`: where each node would be made if it were not.
    """
    found: list[Finding] = []
    for pool in fleet.pools:
        names = [f"{fleet.name}-{pool.name}-{number}" for number in range(pool.nodes)]
        stand = {name: there[name] for name in names if name in there}
        new = {name: zone for name, zone in (planned or {}).items() if name in names and name not in there}
        zones = {**stand, **new}
        if not is_close(pool) or len(set(zones.values())) < 2:
            continue
        counts = [f"{_count(stand, zone)} in {zone}" for zone in sorted(set(stand.values()))]
        counts += [f"{_count(new, zone)} to be made in {zone}" for zone in sorted(set(new.values()))]
        change = _change(pool, stack, stand, new)
        what, need = f"pool {pool.name}", "all in one zone"
        row = Finding("AWS-POOL-APART", "red", what, ", ".join(counts), need, change, "docs/aws.md", verified=True)
        found.append(row)
    return found


def _change(pool: Pool, stack: str, stand: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The next `up` makes what is missing where the last one would have: so what stands elsewhere goes."""
    most = max(sorted(set(stand.values())), key=lambda zone: _count(stand, zone))
    goal = next(iter(new.values()), most)
    gone = [name for name, zone in stand.items() if zone != goal]
    give_up = consent(stack, [machine_urn(stack, name) for name in gone])
    targets = " ".join(f"--target '**::{name}'" for name in gone)
    destroy = f"pulumi destroy --stack {stack} {targets}"
    away = f"take {', '.join(gone)} away, drained: `{give_up}`, `{destroy}`, then `pulumi up --stack {stack}`"
    if not new or len(set(stand.values())) > 1:
        return away
    fewer = f"ask for {len(stand)} nodes of pool {pool.name}"
    stay = f"to try {most} again, put it first in the pool's zones and remove {REFUSALS}/{stack}.jsonl"
    return f"{fewer}; or {stay}; or, to have all in {goal}, {away}"


def _count(zones: Mapping[str, str], zone: str) -> int:
    return list(zones.values()).count(zone)
