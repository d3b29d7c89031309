"""How the command line tells a refusal, and the exit codes that go with it."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager

import typer

from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import SpecError

FINDINGS = 1
REFUSED = 3


@contextmanager
def refusals_told(as_json: bool = False) -> Generator[None]:
    try:
        yield
    except RefusedError as refused:
        raise typer.Exit(tell(refused, as_json)) from refused


def tell(refused: RefusedError, as_json: bool) -> int:
    """Print a refusal and return its exit code."""
    findings = [finding.as_dict() for finding in getattr(refused, "findings", ())]
    if as_json and isinstance(refused, SpecError):
        typer.echo(json.dumps({"findings": findings}, indent=2))
    elif as_json:
        told = {"rule": refused.rule, "found": refused.found, "why": refused.why, "change": refused.change}
        typer.echo(json.dumps({"refused": told, "findings": findings}, indent=2))
    else:
        typer.echo(str(refused), err=True)
    return FINDINGS if isinstance(refused, SpecError) else REFUSED
