"""Which kernel a fleet is locked to: the release that its spec names, or the newest of the series."""

from __future__ import annotations

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import KernelRelease
from gpuyard.plan import names
from gpuyard.spec.fleet import Fleet

FLAVOUR = "amd64"
"""It runs on every machine; that for virtual ones lacks the drivers of most hardware, so a spec has to name it."""


def series_of(fleet: Fleet, catalog: Catalog) -> str:
    """The series of a fleet's kernel, e.g. 6.1."""
    return fleet.kernel_series or names.distribution(catalog, fleet.distribution).kernels[0]


def named(fleet: Fleet, catalog: Catalog) -> KernelRelease | None:
    """The release that the spec names; None where it names a series or nothing. Raises UnknownError."""
    if fleet.kernel is None or fleet.kernel == fleet.kernel_series:
        return None
    offered = [row for row in catalog.kernel_releases if row.distribution == fleet.distribution]
    alike = [row for row in offered if fleet.kernel.split("-", 2)[2] == row.flavour]
    return names.kernel_release(alike or offered, fleet.kernel)


def chosen(fleet: Fleet, catalog: Catalog, stay: str | None) -> KernelRelease | None:
    """The kernel of the lock; None where the catalog has no release for the distribution. `stay` is that of the lock
    before."""
    if row := named(fleet, catalog):
        return row
    series = series_of(fleet, catalog)
    offered = [
        row for row in catalog.kernel_releases if row.distribution == fleet.distribution and row.series == series
    ]
    kept = next((row for row in offered if row.release == stay), None)
    fitting = [row for row in offered if row.flavour == FLAVOUR]
    return kept or max(fitting, key=lambda row: numbers(row.release), default=None)
