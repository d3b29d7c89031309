"""What has to be made for a fleet, as a list: decided here, made by `stacks/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ref:
    """What another thing of the list is known by once it is made."""

    name: str
    attribute: str = "id"


@dataclass(frozen=True, slots=True)
class Json:
    """A document that is given as text; there may be a Ref in it."""

    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One thing to make. `kind` is module and class of the provider's SDK, `inputs` are its arguments."""

    kind: str
    name: str
    inputs: Mapping[str, Any]
    part: str
    """Which part of the fleet it is of: `network`, `access`, `storage`, `gateway`, or a pool."""
    node: str | None = None
    """The node that it is for; None: for all, or for a pool."""
    zone: str | None = None
    """Of a machine: where it is made."""
    keeps: tuple[str, ...] = ()
    """Inputs that are of its making alone: what they are later does not touch it."""
    after: tuple[str, ...] = ()
    """What has to be there before, beside what `inputs` refer to."""


def resource_name(item: Wanted, fleet: str) -> str:
    """What the thing is called in the engine's state: a node by its name, which no other fleet has."""
    return item.name if item.node else f"{fleet}-{item.name}"


def name_in(urn: str) -> str:
    """What the engine's state calls the thing of a URN, as `resource_name` does."""
    return urn.rsplit("::", 1)[1]
