"""The software bill of materials of a lock: every package that its nodes get, with version and hashes where known.

The same lock gives the same bytes: the serial number follows from the lock's digest and no clock is read.
"""

# The library's decorators hide the types of its models from the type checker.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from gpuyard.plan.lock import Lock

_PINNED = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(\[[^\]]*\])?==(?P<version>[^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def sbom_of(lock: Lock, requirements: Mapping[str, str]) -> str:
    """CycloneDX 1.6 as JSON. `requirements`: the text of each requirements file that the lock names."""
    found: dict[str, Component] = {}
    for component in (*_packages(lock), *_engines(lock, requirements), *_models(lock)):
        found.setdefault(str(component.bom_ref.value), component)
    fleet: Any = Component(
        name=lock.fleet, type=ComponentType.PLATFORM, version=lock.digest, bom_ref=f"fleet:{lock.fleet}"
    )
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, lock.digest),
        metadata=BomMetaData(component=fleet),
        components=sorted(found.values(), key=lambda component: str(component.bom_ref.value)),
    )
    # The library stamps the day on what it makes; a lock's bill is the same on every day.
    bom.metadata.timestamp = None
    bom.register_dependency(fleet, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _packages(lock: Lock) -> Iterator[Component]:
    for name, pool in lock.pools.items():
        kind = "deb" if pool.distribution.startswith(("debian", "ubuntu")) else "rpm"
        vendor = pool.distribution.split("-")[0]
        driver = pool.nvidia_driver
        parts = [driver.packages, driver.fabric_manager_packages]
        parts += [part.packages for part in (pool.cuda_toolkit, pool.dcgm) if part]
        for package, version in sorted({item for group in parts for item in group.items()}):
            purl = PackageURL(kind, vendor, package, version, {"distro": pool.distribution})
            yield _component(package, version, purl, ComponentType.LIBRARY, {"gpuyard:repository": driver.repository})
        if pool.kernel_release:
            for package, version in sorted(pool.kernel_release.packages.items()):
                purl = PackageURL(kind, vendor, package, version, {"distro": pool.distribution})
                yield _component(package, version, purl, ComponentType.OPERATING_SYSTEM, {})
        if pool.efa:
            version = pool.efa.installer
            purl = PackageURL("generic", "aws", "efa-installer", version)
            told = {"gpuyard:pool": name, "gpuyard:ofi_nccl": pool.efa.ofi_nccl or ""}
            yield _component("efa-installer", version, purl, ComponentType.LIBRARY, told)


def _engines(lock: Lock, requirements: Mapping[str, str]) -> Iterator[Component]:
    for engine in lock.engines.values():
        for block in re.split(r"\n(?=[A-Za-z0-9])", requirements[engine.requirements]):
            if pinned := _PINNED.match(block):
                name, version = pinned["name"], pinned["version"]
                purl = PackageURL("pypi", None, name.lower(), version)
                hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in _HASH.findall(block)]
                told = {"gpuyard:requirements": engine.requirements}
                component = _component(name, version, purl, ComponentType.LIBRARY, told)
                # A lock file pins every file that a version may be installed from; with one it is the component's own.
                if len(hashes) == 1:
                    component.hashes = hashes
                else:
                    component.properties.update(
                        Property(name="gpuyard:sha256", value=digest.content) for digest in hashes
                    )
                yield component


def _models(lock: Lock) -> Iterator[Component]:
    for model in lock.models:
        source, _, version = model.source.removeprefix("pypi:").partition("==")
        purl = PackageURL("pypi", None, source, version)
        told = {"gpuyard:manifest_sha256": model.manifest_sha256}
        yield _component(model.name, version, purl, ComponentType.MACHINE_LEARNING_MODEL, told)


def _component(name: str, version: str, purl: PackageURL, kind: ComponentType, told: Mapping[str, str]) -> Component:
    return Component(
        name=name,
        version=version,
        type=kind,
        purl=purl,
        bom_ref=f"{kind.value}:{purl.to_string()}",
        properties=[Property(name=key, value=value) for key, value in told.items() if value],
    )
