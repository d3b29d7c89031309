"""`gpuyard check`, `lock`, `compat`, `explain` and what the catalog knows."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gpuyard.catalog import load_catalog, load_instances, numbers
from gpuyard.catalog.rows import Row
from gpuyard.cli.fit_gpus import tell_fitting
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.cli.write import answer, write
from gpuyard.plan import names
from gpuyard.plan.judge import Judge, label
from gpuyard.plan.lock import Lock, LockError, NewerLockError, load_lock, lock_path
from gpuyard.plan.moves import Part, moves, staying
from gpuyard.plan.reports import judged
from gpuyard.plan.resolve import PlanError, World, resolve
from gpuyard.plan.resolve import check as check_fleet
from gpuyard.plan.rules import RULES
from gpuyard.plan.sizing.rules import RULES as PLAN_RULES
from gpuyard.provision.refusals import Machines, refusals
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

FleetFile = Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet's spec, e.g. fleets/lab.yaml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")]


def register(app: typer.Typer) -> None:
    for command in (check, lock, sbom, compat, explain, gpus, drivers, engines):
        app.command()(command)


def check(fleet: FleetFile, as_json: AsJson = False) -> None:
    """Tell everything that is wrong with a fleet's spec, and all that does not go together in it."""
    with refusals_told(as_json):
        found = load_fleet(fleet)
        try:
            choice, findings = check_fleet(found, _world(fleet))
        except PlanError as refused:
            choice, findings = None, list(refused.findings)
        findings += refusals(found, Machines.known())
        red = [finding for finding in findings if finding.level == "red"]
        verdict = "red" if red else "amber" if findings else "green"
        told = {"fleet": found.name, "verdict": verdict, "findings": [finding.as_dict() for finding in findings]}
        lines = [f"{fleet}: {finding}" for finding in findings]
        if choice:
            engines = ", ".join(f"{row.distribution} {row.version}" for row in choice.engines.values())
            lines.append(
                f"{fleet}: fleet {found.name} is {verdict}: "
                f"driver {choice.driver.version} ({choice.kernel_modules}), {engines}"
            )
        else:
            lines.append(f"{fleet}: fleet {found.name} is red: no lock can be made for it")
        answer(as_json, told, "\n".join(lines))
        if red:
            raise typer.Exit(FINDINGS)


def lock(
    fleet: FleetFile,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if the lock would change.")] = False,
    upgrade: Annotated[
        list[str] | None,
        typer.Option(
            "--upgrade", help="driver, cuda, engine, kernel, all: take the newest that fits. May be given again."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose driver, packages, engines and models for a fleet and write them beside its spec.

    Versions of the lock that is there stay as long as they fit; --upgrade lets the named parts move.
    """
    with refusals_told(as_json):
        parts = _parts(upgrade or [])
        wish, world, path = load_fleet(fleet), _world(fleet), lock_path(fleet)
        before = _lock_before(path, wish.name)
        made = resolve(wish, world, staying(before, parts))
        text = made.to_yaml()
        old = path.read_text() if path.is_file() else ""
        outdated = old != text
        moved = moves(before, made, wish, world) if before else []
        if outdated and not check:
            write(path, text)
        told = {
            "fleet": made.fleet,
            "lock": str(path),
            "digest": made.digest,
            "verdict": made.verdict,
            "changed": outdated,
            "moves": [move.as_dict() for move in moved],
        }
        lines = [str(move) for move in moved]
        if outdated and check:
            diff = difflib.unified_diff(old.splitlines(), text.splitlines(), str(path), "as it would be", lineterm="")
            answer(as_json, told, "\n".join([*diff, *lines]))
            raise typer.Exit(FINDINGS)
        state = "written" if outdated else "unchanged"
        hint = "; `gpuyard check` says why it is amber" if made.verdict == "amber" else ""
        lines.append(f"{path}: {state}, {made.digest}, {made.verdict}{hint}")
        answer(as_json, told, "\n".join(lines))


def sbom(
    fleet: FleetFile,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
) -> None:
    """Print the software bill of materials of a fleet's lock, as CycloneDX JSON."""
    from gpuyard.plan.sbom import sbom_of  # the library takes a fifth of a second to import

    with refusals_told():
        made = load_lock(lock_path(fleet))
        project = _project(fleet)
        files = {engine.requirements: project / engine.requirements for engine in made.engines.values()}
        missing = [name for name, path in files.items() if not path.is_file()]
        if missing:
            raise RefusedError(
                "SBOM-REQUIREMENTS", missing[0], "the lock names it, the project has no such file", "lock again"
            )
        text = sbom_of(made, {name: path.read_text() for name, path in files.items()})
        if output:
            write(output, text)
        else:
            typer.echo(text, nl=False)


def compat(
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PART=NAME...", help="e.g. gpu=H100-SXM5-80GB driver=570.133.20 engine=vllm==0.20.0"),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Judge every combination of this file and compare with what it reports."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a combination without a fleet: what is not told is not judged."""
    with refusals_told(as_json):
        judge = Judge(load_catalog(), today())
        if table:
            _judge_table(judge, table, as_json)
            return
        words = dict(_word(part) for part in parts or [])
        if not words:
            raise RefusedError(
                "COMPAT-PART", "no part", "there is nothing to judge", "name some, e.g. gpu=T4 driver=580.126.20"
            )
        combination = names.combination(judge.catalog, words)
        findings, verdict = judge.findings(combination), judge.verdict(combination)
        unsure = [f"{label(row)}: {row.source}" for row in judge.rows(combination) if not row.verified]
        works = all(finding.level != "red" or finding.kind == "kept" for finding in findings)
        plain = [finding.as_dict() for finding in findings]
        told = {"verdict": verdict, "works": works, "findings": plain, "unverified": unsure}
        # Green needs no words. Else: does it run at all, or is it only no longer looked after?
        said = "it works together; what is red is its upkeep" if works else "it does not work together"
        hint = f": {said}" if verdict == "red" else ""
        lines = [*map(str, findings), *(f"not verified: {row}" for row in dict.fromkeys(unsure)), f"{verdict}{hint}"]
        answer(as_json, told, "\n".join(lines))
        if verdict == "red":
            raise typer.Exit(FINDINGS)


def explain(rule: Annotated[str, typer.Argument(metavar="RULE-ID")], as_json: AsJson = False) -> None:
    """Say what a rule is, why, where it comes from, and an example that passes and one that fails."""
    with refusals_told(as_json):
        found = RULES.get(rule.upper())
        if planned := PLAN_RULES.get(rule.upper()):
            told = {"rule": rule.upper(), "says": planned.says, "reason": planned.reason}
            answer(as_json, told, f"{rule.upper()}: {planned.says}\n  why: {planned.reason}\n  told by: gpuyard plan")
            return
        if found is None:
            near = names.nearest(rule.upper(), (*RULES, *PLAN_RULES))
            known = f"known are {', '.join((*RULES, *PLAN_RULES))}"
            raise RefusedError("EXPLAIN-RULE", f"the rule {rule}", known, f"did you mean {near}?")
        judge = Judge(load_catalog(), today())
        fits, fails = (
            " ".join(f"{part}={name}" for part, name in words.items()) for words in (found.fits, found.fails)
        )
        refused = next(
            finding
            for finding in judge.findings(names.combination(judge.catalog, found.fails))
            if finding.rule == found.id
        )
        told = {
            "rule": found.id,
            "says": found.says,
            "reason": found.reason,
            "source": found.source,
            "reads": [*found.parts, *found.also],
            "acceptable": found.acceptable,
            "passes": fits,
            "fails": fails,
        }
        lines = [
            f"{found.id}: {found.says}",
            f"  why: {found.reason}",
            f"  source: {found.source}",
            f"  passes: gpuyard compat {fits}",
            f"  fails: gpuyard compat {fails}",
            f"         {refused}",
            f"  {'can be accepted by a fleet for a while (accept)' if found.acceptable else 'cannot be accepted'}",
        ]
        answer(as_json, told, "\n".join(lines))


def gpus(
    provider: Annotated[
        str | None, typer.Option("--provider", help="Only what this provider has, with its machines.")
    ] = None,
    fits: Annotated[
        str | None, typer.Option("--fits", metavar="MODEL", help="Only those that a model fits on, and on how many.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What the catalog knows of GPUs."""
    with refusals_told(as_json):
        catalog = load_catalog()
        if fits is not None:
            tell_fitting(fits, provider, as_json)
            return
        if provider is None:
            _show(
                as_json,
                "gpus",
                catalog.gpus,
                (
                    "name",
                    "architecture",
                    "compute_capability",
                    "nvswitch",
                    "open_modules",
                    "first_branch",
                    "last_branch",
                    "blocked",
                ),
            )
            return
        known = sorted({row.provider for row in load_instances()})
        if provider not in known:
            change = f"take {names.nearest(provider, known)}"
            raise RefusedError("PLAN-PROVIDER", f"provider {provider}", f"the catalog knows {', '.join(known)}", change)
        rows = [row for row in load_instances() if row.provider == provider]
        _show(as_json, "instances", rows, ("instance", "gpu", "gpus", "vcpus", "memory_gib", "network_gbps", "efa"))


def drivers(as_json: AsJson = False) -> None:
    """What the catalog knows of driver branches, versions, their faults and security bulletins."""
    tables = load_catalog().drivers
    if as_json:
        typer.echo(tables.model_dump_json(indent=2))
        return
    _show(
        False, "branches", tables.branches, ("branch", "kind", "kernel_modules", "cuda", "first_release", "end_of_life")
    )
    versions = sorted(tables.versions, key=lambda row: numbers(row.version), reverse=True)
    _show(False, "versions", versions, ("version", "branch", "released"))
    _show(False, "issues", tables.issues, ("id", "branch", "since", "before", "severity", "symptom"))
    _show(False, "security", tables.security, ("id", "severity", "fixed"))


def engines(as_json: AsJson = False) -> None:
    """What the catalog knows of engines and their security advisories."""
    catalog = load_catalog()
    if as_json:
        tables = {"engines": catalog.engines, "advisories": catalog.advisories}
        typer.echo(
            json.dumps({name: [row.model_dump(mode="json") for row in rows] for name, rows in tables.items()}, indent=2)
        )
        return
    wheel = ("torch", "cuda", "driver_min", "compute_capability_min", "glibc_min", "python_min")
    own = ("distribution", "version", "released", *wheel, "requirements")
    _show(False, "engines", catalog.engines, own)
    _show(False, "advisories", catalog.advisories, ("id", "cve", "affected_from", "fixed_in", "severity", "published"))


def _show(as_json: bool, title: str, rows: Sequence[Row], columns: Iterable[str]) -> None:
    """Every row with the day it was read and whether it is verified; in JSON, all of it."""
    if as_json:
        typer.echo(json.dumps({title: [row.model_dump(mode="json") for row in rows]}, indent=2))
        return
    table = Table(title=title, title_justify="left")
    for column in (*columns, "as_of", "verified"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = [_cell(getattr(row, column)) for column in columns]
        table.add_row(*cells, row.as_of, "yes" if row.verified else "no")
    Console(width=None if Console().is_terminal else 200).print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case tuple() | list():
            return ", ".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
        case dict():
            return ", ".join(f"{key}: {item}" for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]
        case _:
            return str(value)


def _judge_table(judge: Judge, path: Path, as_json: bool) -> None:
    rows = [judged(judge, report) for report in names.reports(path)]
    table = Table(title=str(path), title_justify="left")
    for column in ("combination", "reported", "judged", "by", "source"):
        table.add_column(column, overflow="fold")
    told: list[dict[str, object]] = []
    for row in rows:
        report, by = row.report, ", ".join(row.rules) or row.report.outside
        told.append(
            {
                "id": report.id,
                "combination": report.words,
                "reported": row.reported,
                "judged": row.verdict,
                "by": by,
                "source": report.source,
                "as_of": report.as_of,
            }
        )
        shown = f"{row.verdict} (WRONG)" if row.wrong else row.verdict
        table.add_row(_words_of(report.words), row.reported, shown, by, f"{report.source} ({report.as_of})")
    outside = sum(row.verdict == "not judged" for row in rows)
    wrong = sum(row.wrong for row in rows)
    if as_json:
        typer.echo(json.dumps({"combinations": told, "wrong": wrong}, indent=2))
    else:
        Console(width=None if Console().is_terminal else 200).print(table)
        count = len(rows) - outside
        typer.echo(f"{count} judged: {count - wrong} as reported, {wrong} not; {outside} outside of the rules")
    if wrong:
        raise typer.Exit(FINDINGS)


def _words_of(words: Mapping[str, str]) -> str:
    return " ".join(f"{part}={name}" for part, name in words.items())


def _word(part: str) -> tuple[str, str]:
    name, equals, word = part.partition("=")
    if not equals or not word:
        raise RefusedError("COMPAT-PART", part, "a part is told as NAME=VALUE", "e.g. gpu=T4 driver=580.126.20")
    return name, word


def _parts(words: list[str]) -> list[Part]:
    known: tuple[Part, ...] = ("driver", "cuda", "engine", "kernel", "all")
    for word in words:
        if word not in known:
            raise typer.BadParameter(f"{word!r} is none of {', '.join(known)}", param_hint="--upgrade")
    return [part for part in known if part in words]


def newest(fleet: Path, part: Part) -> tuple[Fleet, str, str]:
    """A fleet's spec, the driver of its lock ("" where there is none), and the driver if that part were locked anew."""
    wish, world = load_fleet(fleet), _world(fleet)
    before = _lock_before(lock_path(fleet), wish.name)
    made = resolve(wish, world, staying(before, [part]))
    return wish, _driver_of(before) if before else "", _driver_of(made)


def _driver_of(lock: Lock) -> str:
    return next(iter(lock.pools.values())).nvidia_driver.version


def _lock_before(path: Path, fleet: str) -> Lock | None:
    """The lock that is there, where it can be trusted.

    One of an older shape, of another fleet or edited by hand gives no preference; a newer gpuyard's is not touched.
    """
    try:
        found = load_lock(path)
    except NewerLockError:
        raise
    except LockError:
        return None
    return found if found.fleet == fleet else None


def _world(fleet: Path) -> World:
    return World(load_catalog(), _requirements(fleet), today())


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def _project(fleet_file: Path) -> Path:
    """The project is the folder above `fleets/`."""
    return fleet_file.resolve().parent.parent


def _requirements(fleet_file: Path) -> Mapping[str, str]:
    """Digests of the project's requirements files."""
    project = _project(fleet_file)
    return {
        path.relative_to(project).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(project.glob("requirements/*.txt"))
    }
