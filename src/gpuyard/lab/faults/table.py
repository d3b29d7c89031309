"""The table of all faults, and how one is found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from gpuyard.lab.faults import gpus, machine, packages, serving
from gpuyard.lab.faults.model import Fault, UsageError, nearest

FAULTS: Mapping[str, Fault] = MappingProxyType(
    {fault.id: fault for fault in (*gpus.FAULTS, *packages.FAULTS, *serving.FAULTS, *machine.FAULTS)}
)


def fault_named(name: str) -> Fault:
    if name in FAULTS:
        return FAULTS[name]
    near = nearest(name, FAULTS)
    raise UsageError(f"no fault {name}", f"{near if 'did you' in near else ''} `gpuyard lab faults` lists them".strip())


def values_in(words: Sequence[str]) -> dict[str, str]:
    """`name=value …` as a user writes it."""
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise UsageError(f"{word!r} is no parameter", "write name=value")
        if name in values:
            raise UsageError(f"{name} is given twice", "give it once")
        values[name] = value
    return values
