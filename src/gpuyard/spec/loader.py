"""Read a document and tell everything that is wrong with it at once, in the file's own terms."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gpuyard.spec.documents import Document, DocumentError, read_document
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.rules import Broken, broken_rules, field_name
from gpuyard.spec.schema import Schema, schema_of

_LONGEST_ECHO = 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with the file."""

    rule: str
    file: str
    line: int
    field: str
    given: str
    allowed: str
    suggestion: str | None = None

    def __str__(self) -> str:
        hint = f"; did you mean {self.suggestion!r}?" if self.suggestion else ""
        where = f"{self.field}: " if self.field else ""
        return f"{self.file}:{self.line}: {self.rule}: {where}given {self.given}; allowed: {self.allowed}{hint}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class SpecError(RefusedError):
    """The spec is refused, for every reason in `findings`."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        first = findings[0]
        super().__init__(first.rule, f"{first.file}:{first.line}: {first.field}", first.given, first.allowed)
        self.findings = findings

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)


def load_fleet(path: Path) -> Fleet:
    """The fleet in the file. Raises SpecError with every finding."""
    return load_as(Fleet, path, broken_rules)


def load_as[D: BaseModel](kind: type[D], path: Path, broken_rules: Callable[[object], list[Broken]]) -> D:
    """The document in the file, held to its model and to the rules between its parts. Raises SpecError."""
    try:
        document = read_document(path)
    except DocumentError as error:
        raise SpecError((Finding("SPEC-YAML", str(path), error.line, "", error.found, error.allowed),)) from error
    except OSError as error:
        given = error.strerror or type(error).__name__
        raise SpecError((Finding("SPEC-FILE", str(path), 1, "", given, "a file that can be read"),)) from error
    repeated = [
        Finding("SPEC-DUPLICATE-KEY", str(path), twice.line, field_name(twice.path), "the key a second time", allowed)
        for twice in document.repeated
        for allowed in [f"each key once; it stands in line {twice.first_line} already"]
    ]
    read: D | None = None
    refused: list[Finding] = []
    try:
        read = kind.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        refused = list(_refused_values(error, schema_of(kind), document, path))
    broken = [
        Finding(rule.rule, str(path), document.line_of(rule.path), rule.field, rule.given, rule.allowed)
        for rule in broken_rules(document.data)
    ]
    if findings := sorted((*repeated, *refused, *broken), key=lambda finding: finding.line):
        raise SpecError(tuple(findings))
    assert read is not None  # noqa: S101 - without a finding the model was accepted
    return read


def _refused_values(error: ValidationError, schema: Schema, document: Document, file: Path) -> Iterator[Finding]:
    for problem in error.errors(include_url=False):
        loc = problem["loc"]
        if not loc and problem["type"] == "value_error":
            continue  # the rules between parts: told one by one from the plain data
        if problem["type"] == "too_short" and problem["input"]:
            continue  # its items were refused, each with a finding of its own
        # A refused key of a mapping ends in a marker of pydantic's own.
        path = loc[:-1] if loc and loc[-1] == "[key]" else loc
        rule, given, allowed, suggestion = "SPEC-VALUE", _echo(problem["input"]), schema.allowed_at(path), None
        match problem["type"]:
            case "extra_forbidden":
                known = schema.fields_at(path[:-1])
                close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
                suggestion = close[0] if close else None
                rule, given, allowed = "SPEC-UNKNOWN-KEY", f"the key {_echo(path[-1])}", f"the keys {', '.join(known)}"
            case "missing":
                rule, given = "SPEC-MISSING", "nothing"
            case "string_pattern_mismatch" if loc != path:
                given, allowed = f"the key {_echo(path[-1])}", schema.allowed_at((*path[:-1], "[key]"))
            case "literal_error" if isinstance(problem["input"], str):
                close = difflib.get_close_matches(problem["input"], schema.choices_at(path), n=1)
                suggestion = close[0] if close else None
            case "string_type" if isinstance(problem["input"], int | float):
                allowed += "; put it in quotes"
            case _:
                pass
        yield Finding(rule, str(file), document.line_of(path), field_name(path), given, allowed, suggestion)


def _echo(value: Any) -> str:
    """What was given, short and on one line."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool():
            return f"{str(value).lower()} (true or false)"
        case int() | float():
            return f"{value} (a number)"
        case _:
            text = str(value)
            return repr(text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}…")
