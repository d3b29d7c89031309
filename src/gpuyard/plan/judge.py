"""The verdict on a combination: every rule that its parts allow, each asked once however often it comes up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, cast

from gpuyard.catalog import Catalog
from gpuyard.catalog.rows import Row, Severity
from gpuyard.plan.rules import RULES
from gpuyard.plan.rules.node import packages_for
from gpuyard.plan.rules.rule import Combination, Misfit, Rule
from gpuyard.spec.errors import RefusedError

Verdict = Literal["green", "amber", "red"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not go together, or that nobody has verified."""

    rule: str
    level: Severity
    what: str
    have: str
    need: str
    change: str
    source: str
    verified: bool
    kind: Literal["works", "kept"] = "works"

    def __str__(self) -> str:
        unsure = "" if self.verified else " (from a row that is not verified)"
        then = f"; {self.change}" if self.change else ""
        where = f"{self.what}: " if self.what else ""
        return f"{self.rule} [{self.level}]: {where}has {self.have}; needs {self.need}{then}{unsure}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def refusal(self) -> RefusedError:
        """For whoever can tell only one."""
        return RefusedError(self.rule, f"{self.what}: {self.have}", self.need, self.change)


@dataclass(slots=True)
class Judge:
    """Judges combinations on one day. `accepted`: rules whose red findings a fleet takes on, and why."""

    catalog: Catalog
    today: str
    accepted: Mapping[str, str] = field(default_factory=dict[str, str])
    _known: dict[tuple[object, ...], tuple[Mapping[str, object], Misfit | None]] = field(
        default_factory=dict[tuple[object, ...], "tuple[Mapping[str, object], Misfit | None]"]
    )

    def misfits(self, combination: Combination) -> Iterator[tuple[Rule, Misfit]]:
        for rule in RULES.values():
            if misfit := self._ask(rule, combination):
                yield rule, misfit

    def fits(self, combination: Combination) -> bool:
        """Whether no rule refuses it."""
        return not any(
            misfit.level == "red" and rule.id not in self.accepted for rule, misfit in self.misfits(combination)
        )

    def findings(self, combination: Combination, what: str = "") -> list[Finding]:
        """All that is to be said, red first."""
        found: list[Finding] = []
        for rule, misfit in self.misfits(combination):
            accepted = misfit.level == "red" and rule.id in self.accepted
            change = f"accepted: {self.accepted[rule.id]}" if accepted else ""
            found.append(
                Finding(
                    rule.id,
                    "amber" if accepted else misfit.level,
                    what,
                    misfit.have,
                    misfit.need,
                    change,
                    misfit.row.source if misfit.row else rule.source,
                    is_verified(rule, misfit, combination),
                    rule.kind,
                )
            )
        return sorted(found, key=lambda finding: finding.level, reverse=True)

    def verdict(self, combination: Combination) -> Verdict:
        """Green only where nothing is against it and every row that says so is verified."""
        levels = {finding.level for finding in self.findings(combination)}
        if "red" in levels:
            return "red"
        return "amber" if "amber" in levels or not all(row.verified for row in self.rows(combination)) else "green"

    def rows(self, combination: Combination) -> list[Row]:
        """The rows of the catalog that a combination rests on: its parts, and what its driver is made of."""
        system, branch = combination.distribution, combination.branch
        packages = packages_for(self.catalog, system.distribution, branch.branch) if system and branch else None
        return [*rows_of(combination), *((packages,) if packages else ())]

    def _ask(self, rule: Rule, combination: Combination) -> Misfit | None:
        needed = {part: getattr(combination, part) for part in rule.parts}
        if any(value is None for value in needed.values()):
            return None
        given = {**needed, **{part: getattr(combination, part) for part in rule.also}}
        key = (rule.id, *(_identity(value) for value in given.values()))
        if key not in self._known:
            world = {"catalog": self.catalog, "today": self.today}
            # What was asked about is held on to: the key tells rows by their identity, which a later row may inherit.
            self._known[key] = given, rule.test(**given, **{name: world[name] for name in rule.asks})
        return self._known[key][1]


def is_verified(rule: Rule, misfit: Misfit, combination: Combination) -> bool:
    """Whether every row that the rule read, and the one that it told of, is verified."""
    rows = [misfit.row, *(getattr(combination, part) for part in (*rule.parts, *rule.also))]
    return all(row.verified for row in rows if isinstance(row, Row))


def rows_of(combination: Combination) -> Iterator[Row]:
    """The rows of the catalog that a combination is made of."""
    yield from combination.features or ()
    for part in fields(combination):
        value = getattr(combination, part.name)
        if isinstance(value, Row):
            yield value


def label(row: Row) -> str:
    """What a row is called in a sentence."""
    ways = (("name",), ("distribution", "version"), ("flag", "value"), ("distribution", "branch_from"), ("repository",))
    for names in (*ways, ("toolkit", "version")):
        if all(hasattr(row, name) for name in names):
            return f"{type(row).__name__} {' '.join(str(getattr(row, name)) for name in names)}"
    for name in ("version", "branch", "installer", "distribution"):
        if hasattr(row, name):
            return f"{type(row).__name__} {getattr(row, name)}"
    return type(row).__name__


def _identity(value: object) -> object:
    # Some rows hold what cannot be hashed.
    if isinstance(value, tuple):
        return tuple(id(row) for row in cast("tuple[object, ...]", value))
    return id(value) if isinstance(value, Row) else value
