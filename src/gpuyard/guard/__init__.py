"""Resources as plain data: read from `pulumi preview --json --show-sames` or from a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from gpuyard.spec.errors import RefusedError

# As the engine names what it will do. The second half of a replacement tells nothing that the first did not.
_REPLACE = {"replace", "create-replacement", "import-replacement"}
_DELETE = {"delete", "discard"}
_OTHERS = {"delete-replaced", "read-replacement", "discard-replaced", "remove-pending-replace"}

Act = Literal["is", "create", "update", "replace", "delete"]


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource, and what is about to be done to it."""

    type: str
    """Its token, e.g. aws:ec2/instance:Instance."""
    name: str
    inputs: Mapping[str, Any]
    """What is asked for; of a resource that goes, what it was."""
    old: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What was asked for before."""
    act: Act = "is"
    because: tuple[str, ...] = ()
    """Properties that the engine names as the reason of a replacement."""
    urn: str = ""
    made_of: tuple[str, ...] = ()
    """URNs that its launch template comes from, where what the template is called is known later."""


def read(data: object) -> list[Resource]:
    """The resources of a preview or a state. Raises RefusedError for anything else."""
    told = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if isinstance(steps := told.get("steps"), list):
        _refuse_left_out(told, cast("list[dict[str, Any]]", steps))
        return [_of_step(step) for step in cast("list[dict[str, Any]]", steps) if step.get("op") not in _OTHERS]
    deployment = told.get("deployment") or told.get("checkpoint", {}).get("latest")
    if isinstance(deployment, dict):
        rows = cast("list[dict[str, Any]]", cast("dict[str, Any]", deployment).get("resources") or [])
        # What is marked for deletion is on its way out.
        return [_of_state(row, "is") for row in rows if not row.get("delete")]
    raise RefusedError(
        "GUARD-FILE",
        "no preview and no state",
        "there are neither steps nor a deployment in it",
        "write it with `pulumi preview --json --show-sames` or `pulumi stack export`",
    )


def _refuse_left_out(told: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Unless it is asked otherwise, the engine leaves out what stays: machines that cost, templates of others."""
    there = sum(step.get("op") == "same" for step in steps)
    summary: Mapping[str, int] = told.get("changeSummary") or {}
    left_out = summary.get("same", 0) - there
    if left_out > 0:
        found, why = f"{left_out} resources left out", "what stays as it is counts too, as in what a fleet costs"
        raise RefusedError("GUARD-FILE", found, why, "write it with `pulumi preview --json --show-sames`")


def _of_step(step: Mapping[str, Any]) -> Resource:
    op = str(step.get("op"))
    new: dict[str, Any] = step.get("newState") or {}
    old: dict[str, Any] = step.get("oldState") or {}
    act: Act = "is"
    if op in _REPLACE:
        act = "replace"
    elif op in _DELETE:
        act = "delete"
    elif op in ("create", "update"):
        act = cast("Act", op)
    reasons = tuple(str(key) for key in cast("Sequence[object]", step.get("replaceReasons") or ()))
    row: dict[str, Any] = {"urn": step.get("urn"), **(new or old)}
    return _of_state(row, act, old.get("inputs") or {}, reasons)


def _of_state(
    row: Mapping[str, Any], act: Act, old: Mapping[str, Any] | None = None, because: tuple[str, ...] = ()
) -> Resource:
    urn = str(row.get("urn", ""))
    kind = str(row.get("type") or urn.split("::")[-2].split("$")[-1] if "::" in urn else row.get("type", ""))
    depends: dict[str, Any] = row.get("propertyDependencies") or {}
    made_of = tuple(map(str, depends.get("launchTemplate") or ()))
    return Resource(kind, urn.split("::")[-1], row.get("inputs") or {}, old or {}, act, because, urn, made_of)


def changed(resource: Resource) -> list[str]:
    """Properties that are asked for otherwise than before."""
    keys = {*resource.inputs, *resource.old} - {"__defaults"}
    return sorted(key for key in keys if resource.inputs.get(key) != resource.old.get(key))
