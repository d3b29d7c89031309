"""What the world offers: small tables, each row with its source and the date it was read."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
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
    KernelRelease,
    LustreClient,
    ModelSource,
    NetworkCards,
    OperatingSystem,
    Quota,
    Repository,
    Row,
    Toolkit,
)
from gpuyard.spec.closed import Closed


class Catalog(Closed):
    """All tables that a lock is chosen from."""

    gpus: tuple[Gpu, ...]
    drivers: Drivers
    kernels: tuple[KernelLimit, ...]
    kernel_releases: tuple[KernelRelease, ...]
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
    tables = {name: _read(name) for name in Catalog.model_fields}
    return TypeAdapter(Catalog).validate_json(json.dumps(tables))


@cache
def load_distributions() -> tuple[OperatingSystem, ...]:
    """That table of the catalog alone, for whom the others would only cost time."""
    return _rows("distributions", TypeAdapter(tuple[OperatingSystem, ...]))


@cache
def load_repositories() -> tuple[Repository, ...]:
    """That table of the catalog alone, for whom the others would only cost time."""
    return _rows("repositories", TypeAdapter(tuple[Repository, ...]))


@cache
def load_instances() -> tuple[Instance, ...]:
    """The machines of cloud providers; apart, because no lock needs them."""
    return _rows("instances", TypeAdapter(tuple[Instance, ...]))


@cache
def load_network_cards() -> tuple[NetworkCards, ...]:
    """The machines with more than one network card; apart, as the machines are."""
    return _rows("network_cards", TypeAdapter(tuple[NetworkCards, ...]))


@cache
def load_lustre_clients() -> tuple[LustreClient, ...]:
    """What a provider's Lustre can be mounted from; apart, as the machines are."""
    return _rows("lustre_clients", TypeAdapter(tuple[LustreClient, ...]))


@cache
def load_quotas() -> tuple[Quota, ...]:
    """What a provider lets run at once; apart, as the machines are."""
    return _rows("quotas", TypeAdapter(tuple[Quota, ...]))


# The tables are our own and large, and every command reads them: libyaml, which PyYAML has, is ten times as fast as the
# reader of specs, which knows the line of every value.
def _reader() -> Any:
    kept = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return type("_Reader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {"yaml_implicit_resolvers": kept})


def _rows[R: Row](name: str, rows: TypeAdapter[tuple[R, ...]]) -> tuple[R, ...]:
    return rows.validate_json(json.dumps(_read(name)))


def _read(name: str) -> object:
    with (Path(__file__).parent / f"{name}.yaml").open(encoding="utf-8") as file:
        return yaml.load(file, Loader=_reader())  # noqa: S506 - a safe loader that leaves dates as they are written


@cache
def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version in the order of versions; what follows the first letter sorts among its equals."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", version))
