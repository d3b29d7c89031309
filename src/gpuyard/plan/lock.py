"""What nodes are converged from, and nothing else: the lock beside the fleet's spec."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from gpuyard.spec.closed import (
    Closed,
    Digest,
    DriverBranch,
    DriverVersion,
    FleetName,
    GpuName,
    Name,
    PoolName,
    Port,
    Sha256,
    digest_of,
)
from gpuyard.spec.documents import DocumentError, read_document
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import EnvName, EnvValue, Fleet, Vllm

PackageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
PackageVersion = Annotated[str, Field(pattern=r"^[0-9][A-Za-z0-9.+:~-]*$")]
Packages = dict[PackageName, PackageVersion]

VERSION: Literal[2] = 2
_HEADER = "# Written by `gpuyard lock`. Change the spec beside it and lock again; a hand edit is refused.\n"


class LockError(RefusedError):
    """A lock that must not be used."""


class NewerLockError(LockError):
    """A lock that a newer gpuyard wrote."""


class LockedDriver(Closed):
    branch: DriverBranch
    version: DriverVersion
    kernel_modules: Literal["open", "proprietary"]
    repository: Literal["nvidia"]
    packages: Packages
    fabric_manager_packages: Packages
    """Installed only where the hardware has an NVSwitch."""


class LockedPackages(Closed):
    version: str
    packages: Packages


class LockedEfa(Closed):
    installer: str
    libfabric: str | None
    efa_driver: str | None
    ofi_nccl: str | None


class LockedRepository(Closed):
    key_fingerprint: str | None
    """Of the key that signs it; None where each copy has a key of its own, which the handover names."""


class LockedPool(Closed):
    distribution: str
    kernel: str
    """Series, e.g. 6.1."""
    kernel_release: LockedPackages | None = None
    """What `gpuyard upgrade kernel` brings a node to, with image and headers; None where the catalog has none, and in
    locks of before."""
    gpu: GpuName
    gpus_per_node: Annotated[int, Field(ge=1)]
    nvidia_driver: LockedDriver
    cuda_toolkit: LockedPackages | None
    dcgm: LockedPackages | None
    efa: LockedEfa | None


class LockedEngine(Closed):
    distribution: str
    version: str
    requirements: Annotated[str, Field(pattern=r"^requirements/[a-z0-9][a-z0-9.-]*\.txt$")]
    requirements_sha256: Sha256
    environment: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    torch: str | None
    cuda: str | None
    """CUDA that its torch is built with."""
    nccl: str | None


class LockedModel(Closed):
    name: Name
    pool: PoolName
    engine: Name
    port: Port
    source: str
    manifest_sha256: Sha256
    vllm: Vllm
    env: dict[EnvName, EnvValue]
    drain_seconds: Annotated[int, Field(ge=1)]


class LockedGateway(Closed):
    port: Port
    max_body_mib: Annotated[int, Field(ge=1)]


class Evidence(Closed):
    """What one choice rests on."""

    choice: str
    because: str
    source: str
    as_of: str
    verified: bool


class Lock(Closed):
    version: Literal[2]
    fleet: FleetName
    spec_digest: Digest
    verdict: Literal["green", "amber"]
    """Amber: something was to be said when it was locked; `gpuyard check` says what."""
    repositories: dict[str, LockedRepository]
    pools: dict[PoolName, LockedPool]
    engines: dict[Name, LockedEngine]
    models: tuple[LockedModel, ...]
    gateway: LockedGateway
    evidence: tuple[Evidence, ...]
    digest: Digest

    @classmethod
    def sealed(
        cls,
        *,
        fleet: Fleet,
        verdict: Literal["green", "amber"],
        repositories: dict[str, LockedRepository],
        pools: dict[str, LockedPool],
        engines: dict[str, LockedEngine],
        models: tuple[LockedModel, ...],
        gateway: LockedGateway,
        evidence: tuple[Evidence, ...],
    ) -> Self:
        """A lock of this fleet, with its digest."""
        unsealed = cls(
            version=VERSION,
            fleet=fleet.name,
            spec_digest=fleet.digest,
            verdict=verdict,
            repositories=repositories,
            pools=pools,
            engines=engines,
            models=models,
            gateway=gateway,
            evidence=evidence,
            digest="sha256:" + "0" * 64,
        )
        return unsealed.model_copy(update={"digest": _seal(unsealed.plain())})

    def plain(self) -> dict[str, object]:
        """Plain data, as it stands in the file: settings that were not asked for are left out."""
        data = self.model_dump(mode="json")
        data["models"] = [
            {**model, "vllm": locked.vllm.model_dump(mode="json", exclude_none=True)}
            for model, locked in zip(data["models"], self.models, strict=True)
        ]
        return data

    def to_yaml(self) -> str:
        """The text of the lock file."""
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
        yaml.width = 4096
        text = StringIO()
        yaml.dump(self.plain(), text)  # pyright: ignore[reportUnknownMemberType]
        return _HEADER + text.getvalue()


def lock_path(fleet_file: Path) -> Path:
    """`fleets/lab.lock.yaml` for `fleets/lab.yaml`."""
    return fleet_file.with_name(f"{fleet_file.stem}.lock.yaml")


def load_lock(path: Path) -> Lock:
    """Read a lock and prove that it is as `gpuyard lock` wrote it."""
    again = f"run `gpuyard lock {path.with_name(path.name.replace('.lock.yaml', '.yaml'))}`"
    if not path.is_file():
        raise LockError("LOCK-MISSING", f"no file {path}", "nodes are converged from the lock alone", again)
    try:
        data = read_document(path).data
    except DocumentError as error:
        raise LockError("LOCK-INVALID", f"{path}:{error.line}: {error.found}", "a lock is plain YAML", again) from error
    data = cast("dict[str, object]", data) if isinstance(data, dict) else {}
    if data.get("version") != VERSION:
        version = data.get("version")
        found, why = f"{path} has version {version!r}", f"this gpuyard knows locks of version {VERSION}"
        if isinstance(version, int) and version > VERSION:
            raise NewerLockError("LOCK-VERSION", found, why, "use the gpuyard that wrote it")
        raise LockError("LOCK-VERSION", found, why, again)
    if data.get("digest") != _seal(data):
        why = "its digest does not match its content, so it was changed by hand"
        raise LockError("LOCK-EDITED", str(path), why, f"change the spec instead, then {again}")
    try:
        return Lock.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LockError("LOCK-INVALID", f"{path}: {place}", first["msg"], again) from error


def check_lock(lock: Lock, fleet: Fleet) -> None:
    """Prove that the lock was made for this fleet as it stands now."""
    again = f"run `gpuyard lock fleets/{fleet.name}.yaml`"
    if lock.fleet != fleet.name:
        found = f"the lock is of fleet {lock.fleet}, the spec of fleet {fleet.name}"
        raise LockError("LOCK-FLEET", found, "a lock serves its own fleet only", again)
    if lock.spec_digest != fleet.digest:
        found = f"the spec of fleet {fleet.name} has changed since it was locked"
        raise LockError("LOCK-STALE", found, "nodes would not get what the spec asks for", again)


def _seal(plain: dict[str, object]) -> str:
    return digest_of({key: value for key, value in plain.items() if key != "digest"})
