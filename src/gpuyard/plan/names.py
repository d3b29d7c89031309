"""From the names that people write to the rows of the catalog. What is not there is refused with what is nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import (
    Branch,
    Dcgm,
    DriverRelease,
    EfaInstaller,
    EngineRelease,
    Feature,
    Gpu,
    KernelRelease,
    ModelSource,
    OperatingSystem,
    Repository,
    Row,
    Toolkit,
)
from gpuyard.plan.rules.rule import Combination
from gpuyard.spec.documents import DocumentError, read_document
from gpuyard.spec.errors import RefusedError

_UNLISTED: dict[str, Any] = {
    "source": "no row of the catalog: judged by its number",
    "as_of": "2026",
    "verified": False,
}
_KEPT: dict[str, Row] = {}
FLAGS = ("attention_backend", "dtype", "quantization", "kv_cache_dtype")


@dataclass(frozen=True, slots=True)
class Report:
    """What someone saw work or fail."""

    id: str
    words: Mapping[str, str]
    works: bool
    why: str
    source: str
    as_of: str
    outside: str
    """Why no rule judges it; empty where they do."""


class UnknownError(RefusedError):
    """The catalog has no row of this name."""


def gpu(catalog: Catalog, name: str) -> Gpu:
    return _found("PLAN-GPU", "GPU", name, {row.name: row for row in catalog.gpus}, "gpus.yaml")


def branch(catalog: Catalog, name: str) -> Branch:
    rows = {row.branch: row for row in catalog.drivers.branches}
    return _found("PLAN-DRIVER-BRANCH", "driver branch", name, rows, "drivers.yaml")


def driver(catalog: Catalog, name: str) -> DriverRelease:
    rows = {row.version: row for row in catalog.drivers.versions}
    return _found("PLAN-DRIVER-VERSION", "driver", name, rows, "drivers.yaml")


def toolkit(catalog: Catalog, name: str) -> Toolkit:
    """The newest release of a toolkit, e.g. 13.0.2 for 13.0, or the one that is named in full."""
    exact = {row.version: row for row in catalog.toolkits}
    if name in exact:
        return exact[name]
    newest: dict[str, Toolkit] = {}
    for row in sorted(catalog.toolkits, key=lambda row: numbers(row.version)):
        newest[row.toolkit] = row
    return _found("PLAN-TOOLKIT", "CUDA toolkit", name, newest, "toolkits.yaml")


def dcgm(catalog: Catalog, name: str) -> Dcgm:
    return _found("PLAN-DCGM", "DCGM", name, {row.version: row for row in catalog.dcgm}, "dcgm.yaml")


def engine(catalog: Catalog, distribution: str, version: str) -> EngineRelease:
    rows = {row.version: row for row in catalog.engines if row.distribution == distribution}
    return _found("PLAN-ENGINE", distribution, version, rows, "engines.yaml")


def efa(catalog: Catalog, name: str) -> EfaInstaller:
    return _found("PLAN-EFA", "EFA installer", name, {row.installer: row for row in catalog.efa}, "efa.yaml")


def distribution(catalog: Catalog, name: str) -> OperatingSystem:
    rows = {row.distribution: row for row in catalog.distributions}
    return _found("PLAN-DISTRIBUTION", "distribution", name, rows, "distributions.yaml")


def kernel_release(offered: Sequence[KernelRelease], name: str) -> KernelRelease:
    """Of those that the archive of a distribution offers."""
    return _found("PLAN-KERNEL", "kernel", name, {row.release: row for row in offered}, "kernel_releases.yaml")


def model(catalog: Catalog, source: str) -> ModelSource:
    rows = {row.source_of_weights: row for row in catalog.models}
    if source in rows:
        return rows[source]
    why = f"the catalog has digests of {', '.join(rows)} only, and no file is served unverified"
    change = "take one of these, or add a row with the digest of its manifest to models.yaml"
    raise UnknownError("PLAN-MODEL", f"weights from {source}", why, change)


def features(catalog: Catalog, flag: str, value: str) -> tuple[Feature, ...]:
    """The rows of one value of a flag. A value without a row needs nothing that the catalog knows of."""
    rows = [row for row in catalog.features if row.flag == flag]
    found = tuple(row for row in rows if row.value == value)
    if not found and flag == "attention_backend":
        _found("PLAN-ATTENTION", "attention backend", value, {row.value: row for row in rows}, "features.yaml")
    return found


def repository(repositories: Sequence[Repository], provider: str | None) -> Repository:
    """The repository of drivers that a provider's nodes use."""
    own = [row for row in repositories if row.provider == provider]
    return (own or [row for row in repositories if row.provider is None])[0]


def newest_of_branch(catalog: Catalog, name: str) -> DriverRelease | None:
    versions = [row for row in catalog.drivers.versions if row.branch == name]
    return max(versions, key=lambda row: numbers(row.version), default=None)


def combination(catalog: Catalog, words: Mapping[str, str]) -> Combination:
    """The combination that these words name, e.g. gpu=T4 driver=580.126.20 engine=vllm==0.32.0.

    Raises UnknownError with the nearest name. A branch alone means its newest version.
    """
    parts: dict[str, Any] = {}
    flags: list[Feature] = []
    readers: dict[str, Callable[[str], object]] = {
        "provider": lambda word: parts.update(provider=word, repository=repository(catalog.repositories, word)),
        "distribution": lambda word: parts.update(distribution=distribution(catalog, word)),
        "kernel": lambda word: parts.update(kernel=_kernel(word)),
        "gpu": lambda word: parts.update(gpu=gpu(catalog, word)),
        "branch": lambda word: _put_branch(parts, catalog, word),
        "driver": lambda word: _put_driver(parts, catalog, word),
        "kernel_modules": lambda word: parts.update(
            kernel_modules=_one_of("kernel_modules", word, ("open", "proprietary"))
        ),
        "fabric_manager": lambda word: parts.update(fabric_manager=word),
        "dcgm": lambda word: parts.update(
            dcgm=_like_the_one_before(catalog.dcgm, "version", word) or dcgm(catalog, word)
        ),
        "toolkit": lambda word: parts.update(toolkit=toolkit(catalog, word)),
        "forward_compatibility": lambda word: parts.update(
            forward_compatibility=_one_of("forward_compatibility", word.lower(), ("true", "false")) == "true"
        ),
        "engine": lambda word: _put_engine(parts, catalog, word),
        "torch": lambda word: _put_engine(parts, catalog, f"torch=={word}"),
        "efa": lambda word: parts.update(
            efa=_like_the_one_before(catalog.efa, "installer", word) or efa(catalog, word)
        ),
        "nccl": lambda word: parts.update(nccl=word),
        **{flag: lambda word, flag=flag: flags.extend(features(catalog, flag, word)) for flag in FLAGS},
    }
    for name, word in words.items():
        if name not in readers:
            close = difflib.get_close_matches(name, readers, n=1, cutoff=0.4)
            change = f"did you mean {close[0]}?" if close else f"name one of {', '.join(readers)}"
            raise UnknownError("COMPAT-PART", f"the part {name!r}", f"known are {', '.join(readers)}", change)
        readers[name](word)
    if flags:
        parts["features"] = tuple(flags)
    return Combination(**parts)


def _put_branch(parts: dict[str, Any], catalog: Catalog, word: str) -> None:
    parts["branch"] = _any_branch(catalog, word)
    if "driver" not in parts and (newest := newest_of_branch(catalog, word)):
        parts["driver"] = newest


def _put_driver(parts: dict[str, Any], catalog: Catalog, word: str) -> None:
    parts["driver"] = _by_number(catalog, word)
    parts["branch"] = _any_branch(catalog, parts["driver"].branch)


def _by_number(catalog: Catalog, word: str) -> DriverRelease:
    """The row of a driver, or one that holds its number alone."""
    known = next((row for row in catalog.drivers.versions if row.version == word), None)
    if known or not re.fullmatch(r"[0-9]{3}(\.[0-9]{1,3}){1,2}", word):
        return known or driver(catalog, word)
    near = by_distance(word, [row.version for row in catalog.drivers.versions])[0]
    unlisted: dict[str, Any] = {
        **_UNLISTED,
        "source": f"no row of the catalog: judged by its number; the nearest one is {near}",
    }
    return _kept(DriverRelease(version=word, branch=word[:3], released=None, **unlisted))


def _any_branch(catalog: Catalog, word: str) -> Branch:
    known = next((row for row in catalog.drivers.branches if row.branch == word), None)
    if known or not re.fullmatch(r"[0-9]{3}", word):
        return known or branch(catalog, word)
    blank = {"kind": None, "kernel_modules": None, "cuda": None, "first_release": None, "end_of_life": None}
    return _kept(Branch(branch=word, **blank, **_UNLISTED))  # pyright: ignore[reportArgumentType]


def _like_the_one_before[Known: (Dcgm, EfaInstaller)](rows: Sequence[Known], field: str, word: str) -> Known | None:
    """The row of a version, or what is known of the newest older one under this number."""
    older = [row for row in rows if re.fullmatch(r"[0-9.]+", word) and numbers(getattr(row, field)) <= numbers(word)]
    newest = max(older, key=lambda row: numbers(getattr(row, field)), default=None)
    if newest is None or getattr(newest, field) == word:
        return newest
    return _kept(newest.model_copy(update={field: word, **_UNLISTED}))


def _kernel(word: str) -> str:
    """The numbers of a kernel's release, e.g. 6.8.0 of 6.8.0-45-generic."""
    if found := re.match(r"[0-9]+(\.[0-9]+)+", word):
        return found.group()
    raise UnknownError("COMPAT-PART", f"kernel={word}", "a kernel is told by its numbers", "e.g. kernel=6.8")


def _kept[Kept: Row](row: Kept) -> Kept:
    """The one row that is alike: who judges knows rows by their identity."""
    return cast("Kept", _KEPT.setdefault(row.model_dump_json(), row))


def _put_engine(parts: dict[str, Any], catalog: Catalog, word: str) -> None:
    name, _, version = word.partition("==")
    known = sorted({row.distribution for row in catalog.engines})
    _one_of("engine", name, known)
    parts["engine"] = engine(catalog, name, version)
    if parts["engine"].nccl:
        parts.setdefault("nccl", parts["engine"].nccl)


def _one_of(part: str, word: str, known: Sequence[str]) -> str:
    if word not in known:
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0)[0]
        raise UnknownError("COMPAT-PART", f"{part}={word}", f"known are {', '.join(known)}", f"take {nearest}")
    return word


def nearest(wanted: str, known: Iterable[str]) -> str:
    """The known name closest to the wanted one: versions by their order, others letter by letter."""
    known = list(known)
    versions = [name for name in known if name[:1].isdigit()]
    if versions and wanted[:1].isdigit():
        return by_distance(wanted, versions)[0]
    return difflib.get_close_matches(wanted, known, n=1, cutoff=0)[0]


def by_distance(wanted: str, known: Iterable[str]) -> list[str]:
    """Versions, those nearest to the wanted one in their order first; of two equally near ones the closer number."""
    ordered = sorted(set(known), key=numbers)
    want = numbers(wanted)
    below = sum(numbers(version) < want for version in ordered)

    def far(version: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        place, have = ordered.index(version), numbers(version)
        steps = below - place if place < below else place - below + (have != want)
        apart = tuple(abs(a - b) for a, b in zip((*have, 0, 0, 0), (*want, 0, 0, 0), strict=False))
        return steps, apart, tuple(-part for part in have)

    return sorted(ordered, key=far)


def _found[Found](rule: str, kind: str, name: str, rows: Mapping[str, Found], table: str) -> Found:
    if name in rows:
        return rows[name]
    if not rows:
        raise UnknownError(rule, f"{kind} {name}", "the catalog has no row of its kind", f"add a row to {table}")
    close = nearest(name, rows)
    shown = list(rows) if len(rows) <= 12 else difflib.get_close_matches(name, list(rows), n=5, cutoff=0)
    known = f"the catalog knows {', '.join(shown)}{' and others' if len(rows) > 12 else ''}"
    raise UnknownError(rule, f"{kind} {name}", known, f"take {close}, or add a row with its source to {table}")


def reports(path: Path) -> list[Report]:
    """The combinations of a file of reports. Raises RefusedError where it is none."""
    try:
        data = read_document(path).data
        rows = cast("list[dict[str, object]]", data)
        return [
            Report(
                **{name: row.pop(name) for name in ("id", "works", "why", "source", "as_of")},  # pyright: ignore[reportArgumentType]
                outside=str(row.pop("outside", "")),
                words={part: str(word).lower() if isinstance(word, bool) else str(word) for part, word in row.items()},
            )
            for row in rows
        ]
    except (DocumentError, OSError, AttributeError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        shape = "a list of mappings with id, works, why, source, as_of and the parts"
        raise RefusedError("COMPAT-TABLE", str(path), why, f"write it as {shape}") from error
