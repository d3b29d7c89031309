"""From wish to lock: a pure choice from the catalog. Whatever does not fit is refused with the smallest way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from gpuyard.catalog import Catalog, DriverRelease, EngineRelease, Gpu, Toolkit, numbers
from gpuyard.plan.lock import (
    Lock,
    LockedDriver,
    LockedEngine,
    LockedGateway,
    LockedModel,
    LockedPool,
    LockedToolkit,
)
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Engine, Fleet, Model, Pool


class PlanError(RefusedError):
    """No lock can be made for this fleet."""


def resolve(fleet: Fleet, catalog: Catalog, requirements: Mapping[str, str]) -> Lock:
    """The lock of this fleet. `requirements` gives the sha256 of each requirements file that an engine may name."""
    driver = _driver(fleet, catalog)
    engines = {engine.name: _engine(engine, catalog) for engine in fleet.engines}
    gpus = {pool.name: _gpu(pool, fleet, driver, catalog) for pool in fleet.pools}
    for model in fleet.models:
        _refuse_engine_that_cannot_run(model, engines[model.engine], gpus[model.pool], driver)
    return Lock.sealed(
        fleet=fleet,
        pools={pool.name: _pool(pool, fleet, driver, gpus[pool.name], catalog) for pool in fleet.pools},
        engines={name: _locked_engine(release, requirements) for name, release in engines.items()},
        models=tuple(_model(model, catalog) for model in fleet.models),
        gateway=LockedGateway(port=fleet.gateway.port, max_body_mib=fleet.gateway.max_body_mib),
    )


def _driver(fleet: Fleet, catalog: Catalog) -> DriverRelease:
    versions = catalog.drivers.versions
    if wanted := fleet.driver.version:
        for release in versions:
            if release.version == wanted:
                return release
        known = [release.version for release in versions]
        raise PlanError(
            "PLAN-DRIVER-VERSION",
            f"driver.version {wanted}",
            f"the catalog knows {', '.join(known)}",
            f"take {_nearest(wanted, known)}, or add a row with its source to drivers.yaml",
        )
    wanted = fleet.driver.branch
    found = [release for release in versions if release.branch == wanted]
    if not found:
        known = list(dict.fromkeys(release.branch for release in versions))
        raise PlanError(
            "PLAN-DRIVER-BRANCH",
            f"driver.branch {wanted}",
            f"the catalog knows {', '.join(known)}",
            f'take branch: "{_nearest(wanted or "", known)}", or add a row with its source to drivers.yaml',
        )
    return max(found, key=lambda release: numbers(release.version))


def _gpu(pool: Pool, fleet: Fleet, driver: DriverRelease, catalog: Catalog) -> Gpu:
    gpu = next((gpu for gpu in catalog.gpus if gpu.name == pool.gpu), None)
    place = f"GPU {pool.gpu} of pool {pool.name}"
    if gpu is None:
        known = [gpu.name for gpu in catalog.gpus]
        close = difflib.get_close_matches(pool.gpu, known, n=3, cutoff=0.4) or known
        change = f"take one of {', '.join(close)}"
        raise PlanError("PLAN-GPU", place, "the catalog has no such row", change)
    if gpu.blocked:
        raise PlanError("PLAN-GPU-BLOCKED", place, gpu.blocked, "choose another GPU")
    if gpu.last_branch and int(driver.branch) > int(gpu.last_branch):
        why = f"driver branch {driver.branch} no longer knows {gpu.architecture}"
        raise PlanError("PLAN-GPU-BRANCH", place, why, f'set driver.branch to "{gpu.last_branch}"')
    flavour = fleet.driver.kernel_modules
    possible = {"unsupported": "proprietary", "required": "open"}.get(gpu.open_modules, flavour)
    if possible != flavour:
        why = f"{gpu.architecture} runs with {possible} kernel modules only"
        raise PlanError("PLAN-KERNEL-MODULES", place, why, f"set driver.kernel_modules to {possible}")
    branch = next(row for row in catalog.drivers.branches if row.branch == driver.branch)
    if flavour not in branch.kernel_modules:
        why = f"branch {driver.branch} has {', '.join(branch.kernel_modules)} kernel modules only"
        change = f"set driver.kernel_modules to {branch.kernel_modules[0]}"
        raise PlanError("PLAN-KERNEL-MODULES", f"driver.kernel_modules {flavour}", why, change)
    return gpu


def _pool(pool: Pool, fleet: Fleet, driver: DriverRelease, gpu: Gpu, catalog: Catalog) -> LockedPool:
    parts = next((row for row in catalog.packages if row.distribution == fleet.distribution), None)
    if parts is None:
        known = ", ".join(row.distribution for row in catalog.packages)
        found = f"distribution {fleet.distribution}"
        raise PlanError("PLAN-DISTRIBUTION", found, f"the catalog has packages for {known}", f"take one of {known}")
    flavour = fleet.driver.kernel_modules
    return LockedPool(
        distribution=fleet.distribution,
        gpu=pool.gpu,
        gpus_per_node=pool.gpus_per_node,
        nvidia_driver=LockedDriver(
            branch=driver.branch,
            version=driver.version,
            kernel_modules=flavour,
            repository=parts.repository,
            packages=_filled({**parts.common, **(parts.open if flavour == "open" else parts.proprietary)}, driver),
            fabric_manager_packages=_filled(parts.fabric_manager, driver) if gpu.nvswitch else {},
        ),
        cuda_toolkit=_toolkit(pool, driver, catalog.toolkits),
    )


def _filled(packages: Mapping[str, str], driver: DriverRelease) -> dict[str, str]:
    return {
        name.format(branch=driver.branch): version.format(branch=driver.branch, version=driver.version)
        for name, version in sorted(packages.items())
    }


def _toolkit(pool: Pool, driver: DriverRelease, toolkits: Iterable[Toolkit]) -> LockedToolkit | None:
    if pool.cuda_toolkit is None:
        return None
    place = f"cuda_toolkit {pool.cuda_toolkit} of pool {pool.name}"
    toolkit = next((row for row in toolkits if row.toolkit == pool.cuda_toolkit), None)
    if toolkit is None:
        known = ", ".join(row.toolkit for row in toolkits)
        raise PlanError("PLAN-TOOLKIT", place, f"the catalog knows {known}", "take one of these, or null")
    if numbers(driver.version) < numbers(toolkit.driver_min):
        why = f"it needs driver {toolkit.driver_min} or newer, the driver is {driver.version}"
        raise PlanError("PLAN-TOOLKIT-DRIVER", place, why, "choose a newer driver.branch")
    return LockedToolkit(version=toolkit.version, packages=toolkit.packages)


def _engine(engine: Engine, catalog: Catalog) -> EngineRelease:
    for release in catalog.engines:
        if (release.distribution, release.version) == (engine.distribution, engine.version):
            return release
    known = [row.version for row in catalog.engines if row.distribution == engine.distribution]
    raise PlanError(
        "PLAN-ENGINE",
        f"engine {engine.name}: {engine.distribution} {engine.version}",
        f"the catalog knows {engine.distribution} {', '.join(known)}",
        f"set version to {_nearest(engine.version, known)}, or add requirements and a row to engines.yaml",
    )


def _refuse_engine_that_cannot_run(model: Model, engine: EngineRelease, gpu: Gpu, driver: DriverRelease) -> None:
    found = f"model {model.name} on {engine.distribution} {engine.version}"
    if engine.driver_min and numbers(driver.version) < numbers(engine.driver_min):
        why = f"the engine needs driver {engine.driver_min} or newer, the driver is {driver.version}"
        raise PlanError("PLAN-ENGINE-DRIVER", found, why, "choose a newer driver.branch")
    least = engine.compute_capability_min
    if least and numbers(gpu.compute_capability) < numbers(least):
        why = f"the engine needs compute capability {least}, {gpu.name} has {gpu.compute_capability}"
        raise PlanError("PLAN-ENGINE-GPU", found, why, "serve it from a pool of newer GPUs")


def _locked_engine(release: EngineRelease, requirements: Mapping[str, str]) -> LockedEngine:
    digest = requirements.get(release.requirements)
    if digest is None:
        raise PlanError(
            "PLAN-REQUIREMENTS",
            f"{release.distribution} {release.version} is installed from {release.requirements}",
            "the project has no such file",
            "compile it with `make lock-python`",
        )
    return LockedEngine(
        distribution=release.distribution,
        version=release.version,
        requirements=release.requirements,
        requirements_sha256=digest,
        environment=f"{release.distribution}-{release.version}-{digest[:12]}",
    )


def _model(model: Model, catalog: Catalog) -> LockedModel:
    row = next((row for row in catalog.models if row.source_of_weights == model.source), None)
    if row is None:
        known = ", ".join(row.source_of_weights for row in catalog.models)
        raise PlanError(
            "PLAN-MODEL",
            f"model {model.name} comes from {model.source}",
            f"the catalog has digests of {known} only, and no file is served unverified",
            "take one of these, or add a row with the digest of its manifest to models.yaml",
        )
    return LockedModel(
        name=model.name,
        pool=model.pool,
        engine=model.engine,
        port=model.port,
        source=model.source,
        manifest_sha256=row.manifest_sha256,
        vllm=model.vllm,
        env=model.env,
        drain_seconds=model.drain_seconds,
    )


def _nearest(wanted: str, known: list[str]) -> str:
    """The known version closest to the wanted one, number by number."""

    def far(version: str) -> tuple[int, ...]:
        return tuple(abs(a - b) for a, b in zip(numbers(version), numbers(wanted), strict=False))

    try:
        return min(known, key=far)
    except ValueError:
        return known[0]
