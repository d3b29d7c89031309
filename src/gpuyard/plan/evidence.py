"""What the choices of a lock rest on."""

from __future__ import annotations

from collections.abc import Iterator

from gpuyard.catalog import Catalog
from gpuyard.catalog.rows import KernelRelease, Row
from gpuyard.plan import names
from gpuyard.plan.lock import Evidence
from gpuyard.plan.wishes import Choice
from gpuyard.spec.fleet import Fleet


def evidence_of(fleet: Fleet, choice: Choice, kernel: KernelRelease | None, catalog: Catalog) -> Iterator[Evidence]:
    """What each choice rests on: the rows of the catalog, each once."""
    driver = choice.driver
    branch = names.branch(catalog, driver.branch)
    asked = fleet.driver.version or (fleet.driver.branch and f"branch {fleet.driver.branch}")
    kind = f"{branch.kind or 'unknown'} branch" + (f", ends {branch.end_of_life}" if branch.end_of_life else "")
    why = f"asked for as {asked}" if asked else "the newest that fits"
    yield _because(f"driver {driver.version}", f"{why}; {kind}", driver)
    if kernel:
        why = f"asked for as {fleet.kernel}" if fleet.kernel else "the distribution's general series"
        yield _because(f"kernel {kernel.release}", why, kernel)
    for pool in fleet.pools:
        own = choice.pools[pool.name]
        if own.toolkit:
            why = f"the newest release of {own.toolkit.toolkit}; runs on drivers from {own.toolkit.driver_min} on"
            yield _because(f"CUDA toolkit {own.toolkit.version}", why, own.toolkit)
        if own.efa:
            why = "asked for" if pool.efa and pool.efa.installer else "the newest with a known hash that fits"
            yield _because(f"EFA installer {own.efa.installer}", why, own.efa)
    if choice.dcgm:
        why = "asked for" if fleet.dcgm and fleet.dcgm.version else "the newest that fits"
        yield _because(f"DCGM {choice.dcgm.version}", why, choice.dcgm)
    for engine in fleet.engines:
        row = choice.engines[engine.name]
        why = "asked for" if engine.version else "the newest that fits"
        needs = f"; needs driver {row.driver_min} or newer" if row.driver_min else ""
        yield _because(f"{row.distribution} {row.version}", why + needs, row)


def _because(choice: str, why: str, row: Row) -> Evidence:
    return Evidence(choice=choice, because=why, source=row.source, as_of=row.as_of, verified=row.verified)
