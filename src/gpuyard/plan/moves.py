"""What a new lock changes of the old one, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from gpuyard.catalog import Catalog, numbers
from gpuyard.plan import names
from gpuyard.plan.judge import Finding
from gpuyard.plan.lock import Lock
from gpuyard.plan.resolve import World, judged
from gpuyard.plan.wishes import Preference
from gpuyard.spec.fleet import Fleet

Part = Literal["driver", "cuda", "engine", "kernel", "all"]


@dataclass(frozen=True, slots=True)
class Move:
    """One version that another one takes the place of."""

    what: str
    before: str
    after: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.before} -> {self.after} ({self.why})"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def staying(lock: Lock | None, upgrade: Iterable[Part] = ()) -> Preference:
    """The versions of a lock to stay with: all but those of the parts that are to be upgraded."""
    moving = set(upgrade)
    if lock is None or "all" in moving:
        return Preference()
    pool = next(iter(lock.pools.values()))
    driver, kernel = pool.nvidia_driver, pool.kernel_release
    keep = {"driver": "driver" not in moving, "cuda": "cuda" not in moving, "engine": "engine" not in moving}
    return Preference(
        driver=driver.version if keep["driver"] else None,
        kernel_modules=driver.kernel_modules,
        kernel=kernel.version if kernel and "kernel" not in moving else None,
        engines={name: engine.version for name, engine in lock.engines.items()} if keep["engine"] else {},
        toolkits={
            name: pool.cuda_toolkit.version for name, pool in lock.pools.items() if pool.cuda_toolkit and keep["cuda"]
        },
        efa={name: pool.efa.installer for name, pool in lock.pools.items() if pool.efa},
        dcgm=next((pool.dcgm.version for pool in lock.pools.values() if pool.dcgm and keep["driver"]), None),
    )


def moves(before: Lock, after: Lock, fleet: Fleet, world: World) -> list[Move]:
    """Each version that differs, with the reason of the difference."""
    refused = {finding.what: finding for finding in _refused_today(before, fleet, world)}
    old, new = dict(_versions(before)), dict(_versions(after))
    found: list[Move] = []
    for what in [*old, *(what for what in new if what not in old)]:
        a, b = old.get(what, "none"), new.get(what, "none")
        if a != b:
            engine = what.removeprefix("requirements of ")
            follows = engine != what and old.get(engine) != new.get(engine)
            why = "those of its version" if follows else _why(what, a, b, refused, after, world.catalog)
            found.append(Move(what, a, b, why))
    return found


def _versions(lock: Lock) -> Iterator[tuple[str, str]]:
    first = next(iter(lock.pools.values()))
    driver = first.nvidia_driver
    yield "driver", driver.version
    yield "kernel modules", driver.kernel_modules
    if first.kernel_release:
        yield "kernel", first.kernel_release.version
    for name, pool in lock.pools.items():
        for part, locked in (("CUDA toolkit", pool.cuda_toolkit), ("DCGM", pool.dcgm)):
            if locked:
                yield f"{part} of pool {name}", locked.version
        if pool.efa:
            yield f"EFA installer of pool {name}", pool.efa.installer
        if pool.nvidia_driver.fabric_manager_packages:
            yield f"fabric manager of pool {name}", driver.version
    for name, engine in lock.engines.items():
        yield f"engine {name}", f"{engine.distribution} {engine.version}"
        yield f"requirements of engine {name}", engine.requirements_sha256[:12]


def _refused_today(lock: Lock, fleet: Fleet, world: World) -> Iterator[Finding]:
    """What the rules say today against the versions of a lock, by the version's name in `_versions`."""
    for what, finding in judged(lock, fleet, world):
        if finding.level == "red":
            yield Finding(**{**finding.as_dict(), "what": what})  # pyright: ignore[reportArgumentType]


def _why(what: str, before: str, after: str, refused: dict[str, Finding], lock: Lock, catalog: Catalog) -> str:
    if what in refused:
        return f"{refused[what].rule}: {refused[what].have}"
    if what.startswith("fabric manager"):
        return "the driver's version, exactly"
    if what.startswith("requirements"):
        return "the project's requirements file has other content"
    if what == "kernel" and before == "none":
        return "none was locked before"
    if "none" in (before, after):
        return "the spec asks for it now" if before == "none" else "the spec no longer asks for it"
    evidence = {item.choice: item for item in lock.evidence}
    told = evidence.get(f"{what} {after}" if what in ("driver", "kernel") else after)
    if what == "driver":
        mended = _mended(before, after, catalog)
        newer = f"; mends {', '.join(mended)}" if mended else ""
        return f"{told.because if told else 'the newest that fits'}{newer}"
    return told.because if told else "the newest that fits"


def _mended(before: str, after: str, catalog: Catalog) -> list[str]:
    """What the security bulletins and known faults of the old version say that the new one no longer has."""
    old, new = names.driver(catalog, before), names.driver(catalog, after)
    found = [
        bulletin.id
        for bulletin in catalog.drivers.security
        if (fixed := bulletin.fixed.get(old.branch))
        and numbers(old.version) < numbers(fixed)
        # Of a branch that a bulletin does not name it is not known.
        and (mended := bulletin.fixed.get(new.branch))
        and numbers(new.version) >= numbers(mended)
    ]
    found += [
        issue.id
        for issue in catalog.drivers.issues
        if issue.before
        and issue.branch == old.branch == new.branch
        and numbers(old.version) < numbers(issue.before) <= numbers(new.version)
    ]
    return found[:4]
