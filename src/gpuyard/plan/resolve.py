"""From wish to lock: a pure choice from the catalog. Whatever does not fit is refused with the smallest way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from gpuyard.catalog import Catalog
from gpuyard.catalog.rows import EngineRelease, KernelRelease
from gpuyard.plan import kernels, names
from gpuyard.plan.conflicts import conflicts
from gpuyard.plan.evidence import evidence_of
from gpuyard.plan.judge import Finding, Judge, label
from gpuyard.plan.lock import (
    Lock,
    LockedDriver,
    LockedEfa,
    LockedEngine,
    LockedGateway,
    LockedModel,
    LockedPackages,
    LockedPool,
    LockedRepository,
)
from gpuyard.plan.rules import RULES
from gpuyard.plan.rules.node import packages_for
from gpuyard.plan.rules.rule import NO_FABRIC_MANAGER, Combination
from gpuyard.plan.wishes import Choice, Preference, Search, flags_of, wishes_of
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet, Model, Pool


class PlanError(RefusedError):
    """No lock can be made for this fleet, for every reason in `findings`."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        first = findings[0]
        super().__init__(
            first.rule, f"{first.what}: {first.have}" if first.what else first.have, first.need, first.change
        )
        self.findings = findings

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)


@dataclass(frozen=True, slots=True)
class World:
    """What a lock is chosen from. `requirements`: sha256 of each requirements file; `today`: the day, YYYY-MM-DD."""

    catalog: Catalog
    requirements: Mapping[str, str]
    today: str


def resolve(fleet: Fleet, world: World, prefer: Preference | None = None) -> Lock:
    """The lock of this fleet. Raises PlanError with every reason why there is none."""
    prefer = prefer or Preference()
    choice, findings = _chosen(fleet, world, prefer)
    unready = [finding for finding in findings if finding.rule in ("PLAN-REQUIREMENTS", "PLAN-MANIFEST")]
    if unready:
        raise PlanError(tuple(replace(finding, level="red") for finding in unready))
    kernel = kernels.chosen(fleet, world.catalog, prefer.kernel)
    return _locked(fleet, choice, kernel, world, findings)


def check(fleet: Fleet, world: World) -> tuple[Choice, list[Finding]]:
    """What would be chosen, and all that is to be said of it. Raises PlanError where nothing can be."""
    return _chosen(fleet, world, Preference())


def _chosen(fleet: Fleet, world: World, prefer: Preference) -> tuple[Choice, list[Finding]]:
    unknown = list(_unknown(fleet, world.catalog))
    if unknown:
        raise PlanError(tuple(unknown))
    judge = Judge(world.catalog, world.today, accepted_on(fleet, world.today))
    search = Search(fleet, world.catalog, judge, world.requirements, prefer)
    wishes = wishes_of(fleet)
    choice = search.choose(wishes)
    if choice is None:
        raise PlanError(tuple(conflicts(search, wishes)))
    return choice, [*_findings(fleet, choice, judge), *_not_lockable(fleet, choice, world), *_without_a_role(fleet)]


def judged(lock: Lock, fleet: Fleet, world: World) -> Iterator[tuple[str, Finding]]:
    """What the rules say today of the driver and the engines that a lock names, each by itself and on its GPUs."""
    judge = Judge(world.catalog, world.today, accepted_on(fleet, world.today))
    rows = {(row.distribution, row.version): row for row in world.catalog.engines}
    drivers = {row.version: row for row in world.catalog.drivers.versions}
    for pool in lock.pools.values():
        driver = drivers.get(pool.nvidia_driver.version)
        gpu = next((row for row in world.catalog.gpus if row.name == pool.gpu), None)
        if driver and gpu:
            branch = names.branch(world.catalog, driver.branch)
            node = Combination(gpu=gpu, branch=branch, driver=driver, kernel_modules=pool.nvidia_driver.kernel_modules)
            yield from (("driver", finding) for finding in judge.findings(node))
    for name, engine in lock.engines.items():
        if row := rows.get((engine.distribution, engine.version)):
            yield from ((f"engine {name}", finding) for finding in judge.findings(Combination(engine=row)))


def accepted_on(fleet: Fleet, today: str) -> dict[str, str]:
    """The rules that the fleet takes on, on this day."""
    return {item.rule: f"{item.reason} (until {item.until})" for item in fleet.accept if today <= item.until}


def combinations(fleet: Fleet, choice: Choice, catalog: Catalog) -> Iterator[tuple[str, Combination]]:
    """Each pool and each model of the fleet with all that was chosen for it."""
    branch = names.branch(catalog, choice.driver.branch)
    system = names.distribution(catalog, fleet.distribution)
    for pool in fleet.pools:
        gpu = names.gpu(catalog, pool.gpu)
        own = choice.pools[pool.name]
        base = Combination(
            provider=fleet.provider,
            repository=names.repository(catalog.repositories, fleet.provider),
            distribution=system,
            kernel=kernels.series_of(fleet, catalog),
            gpu=gpu,
            branch=branch,
            driver=choice.driver,
            kernel_modules=choice.kernel_modules,
            fabric_manager=choice.driver.version if gpu.nvswitch else NO_FABRIC_MANAGER,
            dcgm=choice.dcgm,
            toolkit=own.toolkit,
            efa=own.efa,
        )
        yield f"pool {pool.name}", base
        for model in fleet.models:
            if model.pool == pool.name:
                engine = choice.engines[model.engine]
                rows = tuple(row for flag, value in flags_of(model) for row in names.features(catalog, flag, value))
                yield f"model {model.name}", replace(base, engine=engine, nccl=engine.nccl, features=rows or None)


# --- what is to be said ------------------------------------------------------------------------------------------


def _unknown(fleet: Fleet, catalog: Catalog) -> Iterator[Finding]:
    """Names that the catalog does not have, each with the nearest one."""
    asked: list[tuple[str, Callable[[], object]]] = [
        ("distribution", lambda: names.distribution(catalog, fleet.distribution)),
        ("kernel", lambda: kernels.named(fleet, catalog)),
        ("driver.branch", lambda: fleet.driver.branch and names.branch(catalog, fleet.driver.branch)),
        ("driver.version", lambda: fleet.driver.version and names.driver(catalog, fleet.driver.version)),
        ("dcgm.version", lambda: fleet.dcgm and fleet.dcgm.version and names.dcgm(catalog, fleet.dcgm.version)),
    ]
    for index, pool in enumerate(fleet.pools):
        asked += [
            (f"pools[{index}].gpu", lambda pool=pool: names.gpu(catalog, pool.gpu)),
            (
                f"pools[{index}].cuda_toolkit",
                lambda pool=pool: pool.cuda_toolkit and names.toolkit(catalog, pool.cuda_toolkit),
            ),
            (
                f"pools[{index}].efa.installer",
                lambda pool=pool: pool.efa and pool.efa.installer and names.efa(catalog, pool.efa.installer),
            ),
        ]
    for index, engine in enumerate(fleet.engines):
        asked.append(
            (
                f"engines[{index}].version",
                lambda engine=engine: engine.version and names.engine(catalog, engine.distribution, engine.version),
            )
        )
    for index, model in enumerate(fleet.models):
        if not model.source.startswith("hf:"):
            asked.append((f"models[{index}].source", lambda model=model: names.model(catalog, model.source)))
        asked += [
            (f"models[{index}].vllm.{flag}", lambda flag=flag, value=value: names.features(catalog, flag, value))
            for flag, value in flags_of(model)
        ]
    for place, ask in asked:
        try:
            ask()
        except names.UnknownError as unknown:
            yield Finding(unknown.rule, "red", place, unknown.found, unknown.why, unknown.change, "", verified=True)
    for index, item in enumerate(fleet.accept):
        known = RULES.get(item.rule)
        if known and known.acceptable:
            continue
        able = [rule.id for rule in RULES.values() if rule.acceptable]
        yield Finding(
            "PLAN-ACCEPT",
            "red",
            f"accept[{index}].rule",
            f"{item.rule}, {'which no fleet can accept: what it refuses does not work' if known else 'no rule'}",
            f"one of {', '.join(able)}",
            f"take {names.nearest(item.rule, able)} or leave accept[{index}] out",
            known.source if known else "",
            verified=True,
        )
    blocked = {gpu.name: gpu for gpu in catalog.gpus if gpu.blocked}
    for index, pool in enumerate(fleet.pools):
        if row := blocked.get(pool.gpu):
            have = f"{row.name}, which gpuyard cannot run yet: {row.blocked}"
            place, change = f"pools[{index}].gpu", "choose another GPU"
            yield Finding(
                "PLAN-GPU-BLOCKED",
                "red",
                place,
                have,
                "a GPU whose parts roles install",
                change,
                row.source,
                row.verified,
            )


def _findings(fleet: Fleet, choice: Choice, judge: Judge) -> Iterator[Finding]:
    """What the rules say of what was chosen, each thing once, however many pools and models it concerns."""
    seen: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], Finding] = {}
    unsure: dict[str, list[str]] = {}
    for what, combination in combinations(fleet, choice, judge.catalog):
        for finding in judge.findings(combination):
            key = (finding.rule, finding.have)
            first.setdefault(key, finding)
            seen.setdefault(key, []).append(what)
        for row in judge.rows(combination):
            if not row.verified:
                unsure.setdefault(f"{label(row)}: {row.source}", []).append(what)
    for key, finding in first.items():
        yield replace(finding, what=_all_of(seen[key]))
    for model in fleet.models:
        row = next((row for row in judge.catalog.models if row.source_of_weights == model.source), None)
        if row and not row.verified:
            unsure.setdefault(f"ModelSource {row.source_of_weights}: {row.source}", []).append(f"model {model.name}")
    for row, where in unsure.items():
        name, _, source = row.partition(": ")
        have = f"{name}, a row of the catalog that is not verified"
        change = "compare it with the vendor's own page before you rely on it"
        yield Finding(
            "CATALOG-UNVERIFIED", "amber", _all_of(where), have, "a named source", change, source, verified=False
        )


def _all_of(where: list[str]) -> str:
    where = list(dict.fromkeys(where))
    return ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")


def _not_lockable(fleet: Fleet, choice: Choice, world: World) -> Iterator[Finding]:
    for index, engine in enumerate(fleet.engines):
        row = choice.engines[engine.name]
        if row.requirements in world.requirements:
            continue
        ready = [
            other.version
            for other in world.catalog.engines
            if other.distribution == row.distribution and other.requirements in world.requirements
        ]
        change = f"take {names.nearest(row.version, ready)}, or " if ready else ""
        yield Finding(
            "PLAN-REQUIREMENTS",
            "amber",
            f"engines[{index}].version",
            f"{row.distribution} {row.version}, for which the project has no hash-locked requirements",
            f"the file {row.requirements or 'that its row names'}",
            f"{change}compile it with `make lock-python` and name it in engines.yaml",
            "requirements/",
            verified=True,
        )
    known = {row.source_of_weights for row in world.catalog.models}
    for index, model in enumerate(fleet.models):
        if model.source in known:
            continue
        have = f"{model.source}, of which the catalog has no manifest"
        need = "the digest of every file: none is served unverified"
        change = "add a row with its manifest_sha256 to models.yaml; `gpuyard plan` plans it without"
        where = f"models[{index}].source"
        yield Finding("PLAN-MANIFEST", "amber", where, have, need, change, "models.yaml", verified=True)


def _without_a_role(fleet: Fleet) -> Iterator[Finding]:
    """What is locked, though nothing installs it yet."""
    asked = [("dcgm", fleet.dcgm), *((f"pools[{index}].efa", pool.efa) for index, pool in enumerate(fleet.pools))]
    for place, wish in asked:
        if wish is not None:
            have = "a version in the lock that no role installs yet"
            yield Finding(
                "PLAN-NO-ROLE", "amber", place, have, "a role", "install it yourself", "roles/", verified=True
            )


# --- the lock ----------------------------------------------------------------------------------------------------


def _locked(fleet: Fleet, choice: Choice, kernel: KernelRelease | None, world: World, findings: list[Finding]) -> Lock:
    catalog = world.catalog
    repository = names.repository(catalog.repositories, fleet.provider)
    return Lock.sealed(
        fleet=fleet,
        verdict="amber" if findings else "green",
        repositories={repository.repository: LockedRepository(key_fingerprint=repository.key_fingerprint)},
        pools={pool.name: _pool(pool, fleet, choice, kernel, catalog) for pool in fleet.pools},
        engines={name: _engine(row, world) for name, row in choice.engines.items()},
        models=tuple(_model(model, catalog) for model in fleet.models),
        gateway=LockedGateway(port=fleet.gateway.port, max_body_mib=fleet.gateway.max_body_mib),
        evidence=tuple(evidence_of(fleet, choice, kernel, catalog)),
    )


def _pool(pool: Pool, fleet: Fleet, choice: Choice, kernel: KernelRelease | None, catalog: Catalog) -> LockedPool:
    driver, own = choice.driver, choice.pools[pool.name]
    parts = packages_for(catalog, fleet.distribution, driver.branch)
    assert parts is not None  # noqa: S101 - COMPAT-DISTRIBUTION-DRIVER
    nvswitch = names.gpu(catalog, pool.gpu).nvswitch
    flavour = parts.open if choice.kernel_modules == "open" else parts.proprietary
    major = names.branch(catalog, driver.branch).cuda
    toolkit, dcgm = own.toolkit, choice.dcgm
    return LockedPool(
        distribution=fleet.distribution,
        kernel=kernels.series_of(fleet, catalog),
        kernel_release=LockedPackages(version=kernel.release, packages=kernel.packages) if kernel else None,
        gpu=pool.gpu,
        gpus_per_node=pool.gpus_per_node,
        nvidia_driver=LockedDriver(
            branch=driver.branch,
            version=driver.version,
            kernel_modules=choice.kernel_modules,
            repository=parts.repository,
            packages=_filled({**parts.common, **flavour}, choice),
            fabric_manager_packages=_filled(parts.fabric_manager, choice) if nvswitch else {},
        ),
        cuda_toolkit=LockedPackages(version=toolkit.version, packages=toolkit.packages) if toolkit else None,
        dcgm=LockedPackages(version=dcgm.version, packages={dcgm.packages[(major or "").split(".")[0]]: dcgm.version})
        if dcgm
        else None,
        efa=LockedEfa(
            installer=own.efa.installer,
            libfabric=own.efa.libfabric,
            efa_driver=own.efa.efa_driver,
            ofi_nccl=own.efa.ofi_nccl,
        )
        if own.efa
        else None,
    )


def _filled(packages: Mapping[str, str], choice: Choice) -> dict[str, str]:
    words = {"branch": choice.driver.branch, "version": choice.driver.version}
    return {name.format(**words): version.format(**words) for name, version in sorted(packages.items())}


def _engine(row: EngineRelease, world: World) -> LockedEngine:
    requirements = row.requirements or ""
    digest = world.requirements[requirements]
    return LockedEngine(
        distribution=row.distribution,
        version=row.version,
        requirements=requirements,
        requirements_sha256=digest,
        environment=f"{row.distribution}-{row.version}-{digest[:12]}",
        torch=row.torch,
        cuda=row.cuda,
        nccl=row.nccl,
    )


def _model(model: Model, catalog: Catalog) -> LockedModel:
    return LockedModel(
        name=model.name,
        pool=model.pool,
        engine=model.engine,
        port=model.port,
        source=model.source,
        manifest_sha256=names.model(catalog, model.source).manifest_sha256,
        vllm=model.vllm,
        env=model.env,
        drain_seconds=model.drain_seconds,
    )
