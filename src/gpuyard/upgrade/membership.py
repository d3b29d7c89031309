"""Who comes into a fleet, who leaves it, and how far the exchange of a machine has come: pure answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool as the spec has it, and as the handover does."""

    name: str
    wanted: int
    """Nodes that the spec says."""
    there: tuple[str, ...]
    """Machines of the handover, in its order: that of their numbers where a layout made them."""


@dataclass(frozen=True, slots=True)
class Moves:
    """What is to be done to come from the machines that are there to those that the spec says."""

    coming: tuple[str, ...]
    """Machines that a gateway does not know yet."""
    going: tuple[str, ...]
    """Machines that the next `pulumi up` takes away, the first to go first."""
    missing: Mapping[str, int]
    """How many machines are still to be made, by pool."""
    forgotten: tuple[str, ...]
    """Servers that a gateway has and whose machine is gone."""

    @property
    def lines(self) -> list[str]:
        """The same for people; one line that says so where there is nothing."""
        told = [f"comes: {name}" for name in self.coming]
        told += [f"goes: {name}" for name in self.going]
        told += [f"to be made: {count} of pool {pool}" for pool, count in self.missing.items()]
        told += [f"gone, and still behind a gateway: {name}" for name in self.forgotten]
        return told or ["Nobody comes and nobody goes: the fleet is as its spec says."]


def moves(pools: Sequence[Pool], served: Mapping[str, AbstractSet[str]]) -> Moves:
    """Who comes and who goes. `served`: the servers of each gateway.

    A layout makes the machines 0 to n - 1 of a pool, so those behind the n-th go, the last one first.
    """
    there = [name for pool in pools for name in pool.there]
    stay = [name for pool in pools for name in pool.there[: pool.wanted]]
    return Moves(
        coming=tuple(name for name in stay if not all(name in names for names in served.values())),
        going=tuple(name for pool in pools for name in reversed(pool.there[pool.wanted :])),
        missing={pool.name: pool.wanted - len(pool.there) for pool in pools if pool.wanted > len(pool.there)},
        forgotten=tuple(sorted({name for names in served.values() for name in names} - set(there))),
    )


Step = Literal["drain", "wait", "bring in", "done"]


def replace_step(note: Mapping[str, str] | None, machine: str, again: bool) -> Step:
    """What comes next in the exchange of a node's machine.

    `note`: what the exchange left on the gateway, with `state` leaving or replaced, `machine` the one that goes, and
    `new` the one that took its place. `machine`: who answers under the node's name now, "" for nobody. `again`: consent
    to exchange a machine that came by an exchange.

    A machine that answered nobody when its exchange was begun, and answers now, passes for the new one: it is brought
    to what the lock says and has to prove itself all the same.
    """
    if note is None:
        return "drain"
    if note["state"] == "replaced":
        return "done" if note["new"] == machine and not again else "drain"
    return "bring in" if machine and machine != note["machine"] else "wait"
