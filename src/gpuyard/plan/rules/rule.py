"""What goes with what. A rule reads a few parts of a combination and is silent where they fit.

Rules are pure and know no fleet: a fleet, a single machine and a report from the field are all judged by the same ones.
What is not told is not judged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from gpuyard.catalog.rows import (
    Branch,
    Dcgm,
    DriverRelease,
    EfaInstaller,
    EngineRelease,
    Feature,
    Flavour,
    Gpu,
    OperatingSystem,
    Repository,
    Row,
    Severity,
    Toolkit,
)

NO_FABRIC_MANAGER = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """Parts that are to work together. None: not told, so not judged."""

    provider: str | None = None
    repository: Repository | None = None
    distribution: OperatingSystem | None = None
    kernel: str | None = None
    gpu: Gpu | None = None
    branch: Branch | None = None
    driver: DriverRelease | None = None
    kernel_modules: Flavour | None = None
    fabric_manager: str | None = None
    """Its version, or `none` where it is known to be absent."""
    dcgm: Dcgm | None = None
    toolkit: Toolkit | None = None
    forward_compatibility: bool = False
    engine: EngineRelease | None = None
    features: tuple[Feature, ...] | None = None
    """All rows of the flags' values that were told."""
    efa: EfaInstaller | None = None
    nccl: str | None = None


@dataclass(frozen=True, slots=True)
class Misfit:
    """What one rule found."""

    have: str
    need: str
    level: Severity = "red"
    row: Row | None = None
    """The row of the catalog that tells of it, where the parts themselves do not."""


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    says: str
    reason: str
    source: str
    parts: tuple[str, ...]
    """Parts it needs to be told."""
    also: tuple[str, ...]
    """Parts it reads where they are told."""
    asks: tuple[Literal["catalog", "today"], ...]
    test: Callable[..., Misfit | None]
    fits: Mapping[str, str]
    """An example that passes, in the words of `gpuyard compat`."""
    fails: Mapping[str, str]
    kind: Literal["works", "kept"]
    """Whether things work together, or whether they can be had and are looked after."""
    acceptable: bool
    """A fleet may take it on, with a reason and an end."""


RULES: dict[str, Rule] = {}
PARTS = tuple(field.name for field in fields(Combination))


def rule(
    id: str,
    says: str,
    *,
    reason: str,
    source: str,
    fits: Mapping[str, str],
    fails: Mapping[str, str],
    kind: Literal["works", "kept"] = "works",
    acceptable: bool = False,
) -> Callable[[Callable[..., Misfit | None]], Callable[..., Misfit | None]]:
    """Register a rule. The names of its parameters say what it reads; those with a default may be missing."""

    def register(test: Callable[..., Misfit | None]) -> Callable[..., Misfit | None]:
        given = inspect.signature(test).parameters.values()
        needed = tuple(part.name for part in given if part.name in PARTS and part.default is part.empty)
        also = tuple(part.name for part in given if part.name in PARTS and part.default is not part.empty)
        asks: Any = tuple(part.name for part in given if part.name not in PARTS)
        RULES[id] = Rule(id, says, reason, source, needed, also, asks, test, fits, fails, kind, acceptable)
        return test

    return register


MATRIX = "NVIDIA data center drivers, CUDA Toolkit, Driver and Architecture matrix"
MODULES = "NVIDIA Driver Installation Guide r610 and r620, Kernel Modules"
COMPATIBILITY = "NVIDIA CUDA Compatibility, Minor Version Compatibility and Forward Compatibility"
CATALOG = "the row of the catalog, each with its own source"
