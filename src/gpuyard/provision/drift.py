"""What of a fleet's infrastructure is not as the last `pulumi up` left it, by what `pulumi refresh` tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gpuyard.provision import name_in


@dataclass(frozen=True, slots=True)
class Step:
    """One resource, as the engine found it."""

    op: str
    urn: str
    type: str
    id: str
    old: Mapping[str, Any]
    """Inputs that the state has."""
    new: Mapping[str, Any]
    """Inputs that the account has."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing of the state that the account has no longer, or has otherwise."""

    rule: str
    name: str
    """As the state calls it."""
    type: str
    """Of the provider's SDK, e.g. aws:ec2/instance:Instance."""
    id: str
    """What the account knows, or knew, it by."""
    found: str
    change: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.rule}: {self.name} ({self.id}): {self.found}; {self.change}"


def drifted(steps: Iterable[Step], stack: str) -> Iterator[Drift]:
    """Of the steps of `pulumi refresh --preview-only`. What is asked for is compared, not what the account adds."""
    for step in steps:
        named = (name_in(step.urn), step.type, step.id)
        if step.op == "delete":
            change = f"`pulumi refresh --stack {stack}` takes it out of the state, and `pulumi up` makes it anew"
            yield Drift("DRIFT-GONE", *named, "it is in the state and not in the account", change)
        elif others := [key for key in sorted({*step.old, *step.new}) if step.old.get(key) != step.new.get(key)]:
            change = f"`pulumi up --refresh --stack {stack}` puts back what the spec asks for"
            yield Drift("DRIFT-CHANGED", *named, f"another {', '.join(others)} than `pulumi up` left it with", change)
