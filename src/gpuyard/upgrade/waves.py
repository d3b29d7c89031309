"""Which nodes change together, and which after them. Same photograph in, same answer out; safe to ask again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpuyard.spec.errors import RefusedError

DONE = ("upgrade-done",)
NOT_BEGUN = ("upgrade-required",)
LEAVING = "leaving"
"""Name of the one wave of nodes that do not come back."""


class UpgradeError(RefusedError):
    """A rollout that cannot be walked as it is asked for."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How carefully. Defaults: one canary, and a quarter of the nodes at once, as NVIDIA's operator has it."""

    canary: int = 1
    """Nodes that change, and are watched, before all others. 0: none."""
    max_unavailable: str = "25%"
    """Most nodes out of service at once, those counted that are out already: a number, or a share of all nodes."""
    accept_downtime: bool = False
    """Consent to have no node of a model in service for a while."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node as it stands before the rollout."""

    name: str
    pool: str
    state: str
    """State of its note."""
    serves: bool = True
    """Whether the gateways send it requests."""
    domain: str = ""
    """What fails together: a zone, a rack, a power feed."""
    stays_out: bool = False
    """Somebody else had taken it out before it was begun, so it is not opened when it is done."""
    watched: bool = False
    """It was watched to the end under its users' load, with what is new."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model's load, and what one node can take of it."""

    name: str
    pool: str
    requests: int
    """Requests that run or wait now."""
    seats: int | None = None
    """Requests that one node works on at a time (max_num_seqs); None where the engine's own default holds."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What there is besides the nodes that are to change."""

    nodes: int
    """How many GPU nodes, named in the rollout or not."""
    serving: Mapping[str, int]
    """Nodes that serve, by pool."""
    away: int = 0
    """Nodes that are not named in the rollout, and do not serve."""


@dataclass(frozen=True, slots=True)
class Wave:
    name: str
    nodes: tuple[str, ...]
    watched: tuple[str, ...] = ()
    """Those of them that are watched before anything follows."""


def at_once(policy: Policy, nodes: int) -> int:
    """Most nodes that may be out at once. Raises UpgradeError for what is no number of nodes, or all of them."""
    asked = policy.max_unavailable
    change = 'give a number of nodes from 1 on, or a share like "25%"'
    match = re.fullmatch(r"([0-9]{1,4})(%?)", asked)
    if not match:
        raise UpgradeError("UPGRADE-UNAVAILABLE", f"max_unavailable is {asked!r}", "it is no number of nodes", change)
    number = int(match[1])
    # A share is rounded down, as Kubernetes does it; of a small fleet it is one node nevertheless.
    count = max(math.floor(nodes * number / 100), 1) if match[2] and number else number
    if count < 1 or (match[2] and number > 100):
        raise UpgradeError(
            "UPGRADE-UNAVAILABLE", f"max_unavailable is {asked!r}", "no node could change, or more than all", change
        )
    if count >= nodes and not policy.accept_downtime:
        found = f"max_unavailable {asked} of {nodes} nodes is {count}"
        why = "no node would serve meanwhile"
        more = "add a node" if nodes == 1 else f"allow {nodes - 1} or fewer"
        raise UpgradeError("UPGRADE-DOWNTIME", found, why, f"{more}, or consent with -e upgrade_accept_downtime=true")
    return min(count, nodes)


def waves(nodes: Sequence[Node], fleet: Fleet, policy: Policy) -> list[Wave]:
    """The nodes that are to change, in their order. Raises UpgradeError where a model would lose its last node.

    What was begun is ended first, and watched where no canary has been yet. Then canaries, then batches: no more at
    once than the policy allows, never the last node of a pool that serves, and each batch out of one failure domain, so
    that a domain that fails meanwhile finds the others whole.
    """
    limit = at_once(policy, fleet.nodes)
    going = [node for node in nodes if node.state not in (*DONE, *NOT_BEGUN)]
    waiting = [node for node in nodes if node.state in NOT_BEGUN]
    # A canary that was watched in an earlier run has sung; a node that merely has what is new has not.
    canaries = max(policy.canary - sum(node.watched for node in nodes if node.state in DONE), 0)
    # One that goes back shows nothing of what is new, and one that is not opened has no users.
    begun = [node.name for node in going if node.state != "rollback-required" and not node.stays_out][:canaries]
    canaries = min(canaries - len(begun), len(waiting))
    # Those that somebody else has taken out are out already, and in nobody's way: they come last, on their own.
    apart = [node for node in waiting if not node.serves]
    waiting = [node for node in waiting if node.serves]
    limit = max(limit - len(apart) - fleet.away, 1)
    serving = _serving_then(nodes, fleet)
    found: list[Wave] = []
    # What was begun is out already, however many there are.
    if going:
        found.append(Wave("begun", tuple(node.name for node in going), tuple(begun)))
    for number in range(1, canaries + 1):
        if waiting:
            canary = (waiting.pop(0).name,)
            found.append(Wave(f"canary {number}", canary, canary))
    batch = 0
    while waiting:
        batch += 1
        chosen: list[Node] = []
        taken: Counter[str] = Counter()
        for node in waiting:
            room = policy.accept_downtime or taken[node.pool] < max(serving[node.pool] - 1, 1)
            if len(chosen) < limit and room and (not chosen or node.domain == chosen[0].domain):
                chosen.append(node)
                taken[node.pool] += 1
        waiting = [node for node in waiting if node not in chosen]
        found.append(Wave(f"batch {batch}", tuple(node.name for node in chosen)))
    if apart:
        found.append(Wave("out of service", tuple(node.name for node in apart)))
    _refuse_last_ones(found, nodes, fleet, policy)
    return found


def _serving_then(nodes: Sequence[Node], fleet: Fleet) -> Counter[str]:
    """Nodes that serve when what was begun has been ended, by pool: it is, before anything else is touched."""
    back = (
        node.pool for node in nodes if node.state not in (*DONE, *NOT_BEGUN) and not node.serves and not node.stays_out
    )
    return Counter(fleet.serving) + Counter(back)


def _refuse_last_ones(found: Sequence[Wave], nodes: Sequence[Node], fleet: Fleet, policy: Policy) -> None:
    if policy.accept_downtime:
        return
    by_name = {node.name: node for node in nodes}
    serving = _serving_then(nodes, fleet)
    for wave in found:
        for pool, count in Counter(by_name[name].pool for name in wave.nodes if by_name[name].serves).items():
            if count >= serving[pool] and wave.name != "begun":
                alone = f"{wave.nodes[0]} is the only node of pool {pool} that serves"
                why = "its models would have no node meanwhile"
                change = "bring another node of the pool up first, or consent with -e upgrade_accept_downtime=true"
                raise UpgradeError("UPGRADE-DOWNTIME", alone, why, change)


def refuse_overload(
    found: Sequence[Wave], nodes: Sequence[Node], fleet: Fleet, models: Sequence[Model], policy: Policy
) -> None:
    """Raises UpgradeError where the nodes that stay in service cannot take the requests of now, with the arithmetic."""
    pools = {node.name: node.pool for node in nodes if node.serves}
    serving = _serving_then(nodes, fleet)
    for model in models:
        total = serving[model.pool]
        out = max((sum(pools.get(name) == model.pool for name in wave.nodes) for wave in found), default=0)
        if model.seats is None or not out or policy.accept_downtime:
            continue
        left = total - out
        if model.requests > left * model.seats:
            needed = math.ceil(model.requests / model.seats)
            raise UpgradeError(
                "UPGRADE-CAPACITY",
                f"{model.requests} requests for {model.name} run or wait now",
                f"with {out} of {total} nodes out, {left} are left, {model.seats} seats each: {left * model.seats}",
                f"wait for less load, have {needed + out} nodes in service"
                + (
                    f", or at most {total - needed} out at once (-e upgrade_max_unavailable=…)"
                    if total > needed and found[0].name != LEAVING
                    else ""
                ),
            )


def refuse_leaving(nodes: Sequence[Node], fleet: Fleet, models: Sequence[Model], policy: Policy) -> None:
    """Raises UpgradeError where those that stay could not do the work when all of these are out together, and for long:
    their machines go."""
    wave = Wave(LEAVING, tuple(node.name for node in nodes))
    _refuse_last_ones([wave], nodes, fleet, policy)
    refuse_overload([wave], nodes, fleet, models, policy)


def told(found: Sequence[Wave], versions: Mapping[str, tuple[str, str]]) -> str:
    """The plan as lines for people; `versions` has what each node comes from and goes to."""
    lines = [f"{wave.name}: " + ", ".join(wave.nodes) for wave in found]
    moves = Counter(
        f"{before} -> {after}" for before, after in (versions[name] for wave in found for name in wave.nodes)
    )
    return "\n".join([*(f"{move} on {count} node(s)" for move, count in sorted(moves.items())), *lines])
