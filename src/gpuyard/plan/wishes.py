"""What a fleet asks for, taken apart so that each wish can be dropped or changed, and the search for what grants all.

A fleet has one driver; every engine has one version; the rest is chosen per pool. So the search walks through the
drivers, best first, and asks for each whether every pool and every engine finds something that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import Dcgm, DriverRelease, EfaInstaller, EngineRelease, Flavour, Toolkit
from gpuyard.plan import names
from gpuyard.plan.judge import Judge
from gpuyard.plan.rules.rule import Combination
from gpuyard.spec.fleet import Engine, Fleet, Model, Pool

Key = tuple[str, str]
"""Kind of a wish and what it is about, e.g. ("gpu", "T4") or ("engine", "cpu")."""
Wishes = Mapping[Key, str]

# A fleet of 50 models asks for few different things; each is judged once.
_FLAGS = names.FLAGS


@dataclass(frozen=True, slots=True)
class Preference:
    """Versions to stay with where they fit: those of the lock before."""

    driver: str | None = None
    kernel_modules: Flavour | None = None
    kernel: str | None = None
    """Release."""
    engines: Mapping[str, str] = field(default_factory=dict[str, str])
    toolkits: Mapping[str, str] = field(default_factory=dict[str, str])
    """By pool."""
    efa: Mapping[str, str] = field(default_factory=dict[str, str])
    dcgm: str | None = None


@dataclass(frozen=True, slots=True)
class PoolChoice:
    toolkit: Toolkit | None
    efa: EfaInstaller | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One version of everything, all of which go together."""

    driver: DriverRelease
    kernel_modules: Flavour
    dcgm: Dcgm | None
    pools: Mapping[str, PoolChoice]
    engines: Mapping[str, EngineRelease]


def wishes_of(fleet: Fleet) -> dict[Key, str]:
    """Every wish that can be granted, dropped or changed."""
    found: dict[Key, str] = {("provider", ""): fleet.provider, ("distribution", ""): fleet.distribution}
    said = {
        ("kernel", ""): fleet.kernel_series,
        ("driver.branch", ""): fleet.driver.branch,
        ("driver.version", ""): fleet.driver.version,
        ("driver.kernel_modules", ""): fleet.driver.kernel_modules,
        ("dcgm", ""): "any" if fleet.dcgm else None,
        ("dcgm.version", ""): fleet.dcgm.version if fleet.dcgm else None,
    }
    for pool in fleet.pools:
        said["gpu", pool.gpu] = pool.gpu
        if pool.cuda_toolkit:
            said["cuda_toolkit", pool.cuda_toolkit] = pool.cuda_toolkit
        if pool.efa:
            said["efa", ""] = "any"
        if pool.efa and pool.efa.installer:
            said["efa.installer", pool.efa.installer] = pool.efa.installer
    for engine in fleet.engines:
        if engine.version:
            said["engine", engine.name] = engine.version
        else:
            said["engine.distribution", engine.name] = engine.distribution
    for model in fleet.models:
        for flag, value in flags_of(model):
            said[flag, value] = value
    return {**found, **{key: value for key, value in said.items() if value is not None}}


def places_of(fleet: Fleet, key: Key) -> list[str]:
    """Where in the spec a wish stands, in the spec's own words."""
    kind, about = key
    match kind:
        case "gpu" | "cuda_toolkit":
            return [f"pools[{index}].{kind}" for index, pool in enumerate(fleet.pools) if getattr(pool, kind) == about]
        case "efa":
            return [f"pools[{index}].efa" for index, pool in enumerate(fleet.pools) if pool.efa]
        case "efa.installer":
            return [
                f"pools[{index}].efa.installer"
                for index, pool in enumerate(fleet.pools)
                if pool.efa and pool.efa.installer == about
            ]
        case "engine" | "engine.distribution":
            field = "version" if kind == "engine" else "distribution"
            return [f"engines[{index}].{field}" for index, item in enumerate(fleet.engines) if item.name == about]
        case _ if kind in _FLAGS:
            return [
                f"models[{index}].vllm.{kind}"
                for index, model in enumerate(fleet.models)
                if (kind, about) in flags_of(model)
            ]
        case _:
            return [kind]


def flags_of(model: Model) -> list[tuple[str, str]]:
    given = model.vllm.model_dump(mode="json", exclude_none=True)
    return [(flag, str(given[flag])) for flag in _FLAGS if flag in given]


@dataclass(slots=True)
class Search:
    """Finds what grants wishes. `lockable`: digests of the project's requirements files, by their names."""

    fleet: Fleet
    catalog: Catalog
    judge: Judge
    lockable: Mapping[str, str]
    prefer: Preference = field(default_factory=Preference)
    _pools: dict[tuple[object, ...], list[str]] = field(default_factory=dict[tuple[object, ...], list[str]])

    def __post_init__(self) -> None:
        for pool in self.fleet.pools:
            self._pools.setdefault(_kind(pool), []).append(pool.name)

    def choose(self, wishes: Wishes) -> Choice | None:
        """The best that grants these wishes, or None. What is not wished for is free."""
        for driver, modules in self.drivers(wishes):
            if choice := self.choose_with(wishes, driver, modules):
                return choice
        return None

    def choose_with(self, wishes: Wishes, driver: DriverRelease, modules: Flavour) -> Choice | None:
        node = self.node(wishes, driver, modules)
        if not self.judge.fits(node):
            return None
        dcgm = self._first(node, "dcgm", self.dcgms(wishes)) if ("dcgm", "") in wishes else None
        if ("dcgm", "") in wishes and dcgm is None:
            return None
        bases: dict[str, Combination] = {}
        for members in self._pools.values():
            pool = next(pool for pool in self.fleet.pools if pool.name == members[0])
            base = self.pool(wishes, pool, node)
            if base is None:
                return None
            bases |= dict.fromkeys(members, base)
        engines: dict[str, EngineRelease] = {}
        for engine in self.fleet.engines:
            demands = self.demands(wishes, engine.name, bases)
            if not self.wants(wishes, engine):
                # What its models ask of their GPUs stands all the same.
                if not all(self.judge.fits(demand) for demand in demands):
                    return None
                continue
            rows = self.engines(wishes, engine.name)
            found = next((row for row in rows if self.runs(wishes, engine.name, row, demands, bases)), None)
            if found is None:
                return None
            engines[engine.name] = found
        pools: dict[str, PoolChoice] = {}
        for pool in self.fleet.pools:
            used = {engines[name].nccl for name in self._served_by(pool) if name in engines}
            efa = self._efa(wishes, pool, bases[pool.name], used or {None})
            if pool.efa and ("efa", "") in wishes and efa is None:
                return None
            pools[pool.name] = PoolChoice(bases[pool.name].toolkit, efa)
        return Choice(driver, modules, dcgm, pools, engines)

    # --- combinations ---

    def node(self, wishes: Wishes, driver: DriverRelease | None, modules: Flavour | None) -> Combination:
        """What every node of the fleet has."""
        system = wishes.get(("distribution", ""))
        row = names.distribution(self.catalog, system) if system else None
        provider = wishes.get(("provider", ""))
        return Combination(
            provider=provider,
            repository=names.repository(self.catalog.repositories, provider) if provider else None,
            distribution=row,
            kernel=wishes.get(("kernel", "")) or (row.kernels[0] if row else None),
            branch=names.branch(self.catalog, driver.branch) if driver else None,
            driver=driver,
            kernel_modules=modules,
        )

    def pool(self, wishes: Wishes, pool: Pool, node: Combination) -> Combination | None:
        """What every node of a pool has, without EFA; None where nothing fits."""
        gpu = wishes.get(("gpu", pool.gpu))
        wanted = wishes.get(("cuda_toolkit", pool.cuda_toolkit)) if pool.cuda_toolkit else None
        base = replace(
            node,
            gpu=names.gpu(self.catalog, gpu) if gpu else None,
        )
        if wanted is None:
            return base if self.judge.fits(base) else None
        toolkit = self._first(base, "toolkit", self.toolkits(wanted, pool.name))
        return replace(base, toolkit=toolkit) if toolkit else None

    def demands(self, wishes: Wishes, engine: str, bases: Mapping[str, Combination]) -> list[Combination]:
        """What the models of an engine ask of it, each thing once."""
        found: dict[tuple[object, ...], Combination] = {}
        for model in self.fleet.models:
            if model.engine != engine:
                continue
            flags = tuple((flag, wishes[flag, value]) for flag, value in flags_of(model) if (flag, value) in wishes)
            base = bases[model.pool]
            rows = tuple(row for flag, value in flags for row in names.features(self.catalog, flag, value))
            found.setdefault((id(base), flags), replace(base, features=rows or None))
        return list(found.values())

    def runs(
        self,
        wishes: Wishes,
        name: str,
        row: EngineRelease,
        demands: Iterable[Combination],
        bases: Mapping[str, Combination],
    ) -> bool:
        """Whether this version of an engine does what its models ask of it, over EFA where their pools have it."""
        return all(self.judge.fits(replace(demand, engine=row, nccl=row.nccl)) for demand in demands) and all(
            self._efa(wishes, pool, bases[pool.name], {row.nccl})
            for pool in self.fleet.pools
            if pool.efa and ("efa", "") in wishes and name in self._served_by(pool)
        )

    def _served_by(self, pool: Pool) -> set[str]:
        return {model.engine for model in self.fleet.models if model.pool == pool.name}

    def _efa(self, wishes: Wishes, pool: Pool, base: Combination, used: Iterable[str | None]) -> EfaInstaller | None:
        """The first installer for a pool whose engines use these versions of NCCL."""
        if pool.efa is None or ("efa", "") not in wishes:
            return None
        for row in self.installers(wishes, pool):
            if all(self.judge.fits(replace(base, efa=row, nccl=nccl)) for nccl in used):
                return row
        return None

    def _first[Part](self, base: Combination, part: str, rows: Iterable[Part]) -> Part | None:
        return next((row for row in rows if self.judge.fits(replace(base, **{part: row}))), None)

    # --- candidates, best first ---

    def drivers(self, wishes: Wishes) -> Iterator[tuple[DriverRelease, Flavour]]:
        """Long-term and production branches before others, verified rows before others, then the newest."""
        branches = {row.branch: row for row in self.catalog.drivers.branches}

        def rank(row: DriverRelease) -> tuple[object, ...]:
            branch = branches[row.branch]
            supported = branch.kind in ("lts", "production")
            return row.version == self.prefer.driver, supported, row.verified and branch.verified, numbers(row.version)

        branch, version = wishes.get(("driver.branch", "")), wishes.get(("driver.version", ""))
        flavours: list[Flavour] = sorted(("open", "proprietary"), key=lambda word: word != self.prefer.kernel_modules)
        modules = wishes.get(("driver.kernel_modules", ""))
        for row in sorted(self.catalog.drivers.versions, key=rank, reverse=True):
            if branch in (None, row.branch) and version in (None, row.version):
                for flavour in flavours:
                    if modules in (None, flavour):
                        yield row, flavour

    def wants(self, wishes: Wishes, engine: Engine) -> bool:
        return ("engine", engine.name) in wishes or ("engine.distribution", engine.name) in wishes

    def engines(self, wishes: Wishes, name: str) -> list[EngineRelease]:
        """A version that is wished for is judged as it is; a free one is chosen among those that can be locked."""
        distribution = next(engine.distribution for engine in self.fleet.engines if engine.name == name)
        rows = [row for row in self.catalog.engines if row.distribution == distribution]
        if wanted := wishes.get(("engine", name)):
            return [row for row in rows if row.version == wanted]
        rows = [row for row in rows if row.requirements in self.lockable]
        stay = self.prefer.engines.get(name)
        return sorted(rows, key=lambda row: (row.version == stay, numbers(row.version)), reverse=True)

    def toolkits(self, wanted: str, pool: str) -> list[Toolkit]:
        stay = self.prefer.toolkits.get(pool)
        rows = [row for row in self.catalog.toolkits if row.toolkit == wanted]
        return sorted(rows, key=lambda row: (row.version == stay, numbers(row.version)), reverse=True)

    def installers(self, wishes: Wishes, pool: Pool) -> list[EfaInstaller]:
        """Those with a known hash before others, also before what is locked: nodes run no other as root."""
        asked = pool.efa.installer if pool.efa else None
        wanted = wishes.get(("efa.installer", asked)) if asked else None
        rows = [row for row in self.catalog.efa if wanted in (None, row.installer)]
        stay = self.prefer.efa.get(pool.name)

        def rank(row: EfaInstaller) -> tuple[object, ...]:
            return row.sha256 is not None, row.installer == stay, numbers(row.installer)

        return sorted(rows, key=rank, reverse=True)

    def dcgms(self, wishes: Wishes) -> list[Dcgm]:
        wanted = wishes.get(("dcgm.version", ""))
        rows = [row for row in self.catalog.dcgm if wanted in (None, row.version)]
        stay = self.prefer.dcgm
        return sorted(rows, key=lambda row: (row.version == stay, numbers(row.version)), reverse=True)


def _kind(pool: Pool) -> tuple[object, ...]:
    # Toolkits may stay at different releases by pool, so only pools without one are alike.
    apart: Literal[""] | str = pool.name if pool.cuda_toolkit else ""
    return pool.gpu, pool.cuda_toolkit, apart
