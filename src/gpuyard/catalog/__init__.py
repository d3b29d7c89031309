"""What the world offers: small tables, each row with its source and the date it was read."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from gpuyard.catalog.rows import (
    Advisory,
    Dcgm,
    DriverPackages,
    Drivers,
    EfaInstaller,
    EngineIssue,
    EngineRelease,
    Feature,
    Gpu,
    Instance,
    KernelLimit,
    ModelSource,
    OperatingSystem,
    Repository,
    Row,
    Toolkit,
)
from gpuyard.spec.closed import Closed
from gpuyard.spec.documents import read_document


class Catalog(Closed):
    """All tables that a lock is chosen from."""

    gpus: tuple[Gpu, ...]
    drivers: Drivers
    kernels: tuple[KernelLimit, ...]
    distributions: tuple[OperatingSystem, ...]
    packages: tuple[DriverPackages, ...]
    repositories: tuple[Repository, ...]
    toolkits: tuple[Toolkit, ...]
    dcgm: tuple[Dcgm, ...]
    engines: tuple[EngineRelease, ...]
    engine_issues: tuple[EngineIssue, ...]
    features: tuple[Feature, ...]
    advisories: tuple[Advisory, ...]
    efa: tuple[EfaInstaller, ...]
    models: tuple[ModelSource, ...]

    def tables(self) -> dict[str, tuple[Row, ...]]:
        """Every table of rows by its name."""
        own = {name: getattr(self, name) for name in Catalog.model_fields if name != "drivers"}
        return {**own, **{f"drivers.{name}": getattr(self.drivers, name) for name in type(self.drivers).model_fields}}


@cache
def load_catalog() -> Catalog:
    """The tables that come with gpuyard."""
    tables = {name: read_document(_table(name)).data for name in Catalog.model_fields}
    return TypeAdapter(Catalog).validate_json(json.dumps(tables))


@cache
def load_instances() -> tuple[Instance, ...]:
    """The machines of cloud providers; apart, because no lock needs them."""
    text = json.dumps(read_document(_table("instances")).data)
    return TypeAdapter(tuple[Instance, ...]).validate_json(text)


def _table(name: str) -> Path:
    return Path(__file__).parent / f"{name}.yaml"


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version in the order of versions; what follows the first letter sorts among its equals."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))
