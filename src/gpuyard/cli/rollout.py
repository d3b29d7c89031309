"""A rollout's playbook: planned, asked for, watched, reported."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gpuyard.cli.lab import console, project_of
from gpuyard.cli.play import Play, Told, interrupts, played
from gpuyard.cli.refusals import FINDINGS, REFUSED
from gpuyard.cli.write import write
from gpuyard.upgrade.record import RecordError
from gpuyard.upgrade.report import html
from gpuyard.upgrade.runs import AT_REST, Run, out_of_rotation, run_of, typical
from gpuyard.upgrade.waves import UpgradeError

RECORD = "record.jsonl"
REPORT = "report.html"


@dataclass
class Rollout:
    """A playbook that changes nodes: planned, asked for, watched, reported."""

    stack: str
    playbook: str
    words: Mapping[str, str]
    limit: str
    verbose: bool
    as_json: bool

    def __post_init__(self) -> None:
        self.project = project_of()
        self.console = Console(stderr=True)

    def arguments(self, *more: str) -> list[str]:
        values = [word for name, value in self.words.items() for word in ("-e", f"{name}={value}")]
        return [*(["--limit", self.limit] if self.limit else []), *values, *more]

    def go(self, *, check: bool, yes: bool) -> None:
        if check or not yes:
            self.preview()
        if check:
            return
        if not yes:
            if not sys.stdin.isatty():
                change = "say --yes, or look first with --check"
                raise UpgradeError("UPGRADE-CONFIRM", "this changes nodes that serve", "nobody is here to ask", change)
            typer.confirm("Change these nodes?", abort=True, err=True)
        self.walk()

    def preview(self) -> None:
        told = played(self.project, self.stack, self.playbook, self.arguments("--check"))
        if told.rc:
            self.fail(told)
        # The first line names the run, and a check has none.
        for line in told.plan[1:]:
            typer.echo(line, err=True)

    def walk(self) -> None:
        play = Play(self.project, self.stack, self.playbook, self.arguments("-e", "upgrade_confirm=false"))
        typer.echo(f"↳ {play.line}", err=True)
        usual = typical(self.runs())

        asked = False

        def interrupted(times: int) -> None:
            nonlocal asked
            if times == 1:
                asked = True
                self.console.print("stopping before the next node; Ctrl-C again stops at once")
            else:
                play.kill()

        pauses: list[Play] = []

        # Not from within the handler of a signal: the playbook that pauses takes seconds. It pauses this run and no
        # other, so it waits until there is one; where it was not heard it is played again.
        def pause() -> None:
            run = play.told.claim.get("run", "")
            unheard = pauses[-1].ended(0) and pauses[-1].told.rc != 0 if pauses else True
            if not (asked and run and unheard):
                return
            if pauses:
                self.console.print(f"it was not heard, and is said again: {'; '.join(pauses[-1].told.failures)[:200]}")
            pauses.append(Play(self.project, self.stack, "pause_upgrade", ["-e", f"pause_upgrade_run={run}"]))

        with interrupts(interrupted):
            self.watch(play, usual, pause)
            if pauses:
                pauses[-1].wait()
        self.end(play.told)

    def runs(self) -> list[Run]:
        found: list[Run] = []
        for path in records(self.project):
            try:
                found.append(run_of(path))
            except RecordError:
                continue  # `gpuyard runs` tells of it; how long things usually take can do without
        return found

    def watch(self, play: Play, usual: Mapping[str, float], meanwhile: Callable[[], None]) -> None:
        told, lines = play.told, 0
        if self.console.is_terminal:
            with Live(console=self.console, get_renderable=lambda: view(told, usual), refresh_per_second=2):
                while not play.ended(0.5):
                    meanwhile()
            return
        while True:
            ended = play.ended(0.5)
            for node, state in told.moved[lines:]:
                typer.echo(f"{datetime.now(UTC):%H:%M:%S} {node} {state}", err=True)
                lines += 1
            if ended:
                return
            meanwhile()

    def end(self, told: Told) -> None:
        run = told.claim.get("run", "")
        record = self.project / ".gpuyard/runs" / run / RECORD
        report = record.with_name(REPORT)
        found = run_of(record) if run and record.is_file() else None
        if found:
            write(report, html(found))
        if self.verbose and told.output.is_file():
            typer.echo(told.output.read_text(errors="replace"), err=True)
        if self.as_json:
            answer = {"rc": told.rc, "failures": told.failures, "report": str(report) if found else None}
            typer.echo(json.dumps({**answer, **(found.as_dict() if found else {})}, indent=2))
        elif found:
            show_run(found)
            typer.echo(f"report: {report}")
        if told.rc:
            self.fail(told, run)

    def fail(self, told: Told, run: str = "") -> None:
        """Say why, and how to go on. Ends with 1 where a node was touched, with 3 where all are as before."""
        for line in told.failures or [f"ansible-playbook ended with {told.rc}"]:
            typer.secho(line, err=True)
        typer.echo(f"all that ansible printed: {told.output}", err=True)
        if run and not told.claim.get("result"):
            typer.echo(f"to go on: gpuyard upgrade resume {run} --stack {self.stack}", err=True)
        for page in runbook(self.project, told):
            typer.echo(f"what to do: {page}", err=True)
        touched = any(note["touched"] and note["state"] != "upgrade-done" for note in told.notes.values())
        raise typer.Exit(FINDINGS if touched else REFUSED)


def runbook(project: Path, told: Told) -> list[str]:
    """The pages on the states that nodes were left in, where the project has them."""
    states = {note["state"] for note in told.notes.values()} - {"upgrade-done"}
    names = {state if state in (*AT_REST, "upgrade-required") else "on-the-way" for state in states}
    pages = [f"docs/runbook/{name}.md" for name in sorted(names)]
    return [page for page in pages if (project / page).is_file()]


def view(told: Told, usual: Mapping[str, float]) -> Table:
    """Nodes and their states, while it runs."""
    now = time.monotonic()
    table = Table(
        "node", "from, to", "state", "for", "usually", "doing", title=told.claim.get("run"), title_justify="left"
    )
    for node, note in sorted(told.notes.items()):
        state = note["state"]
        rests = state in AT_REST
        spent = "" if rests else f"{now - told.since[node]:.0f} s"
        expected = f"{usual[state]:.0f} s" if state in usual and not rests else ""
        versions = f"{note['previous']['version']} → {note['target']['version']}"
        table.add_row(node, versions, state, spent, expected, "" if rests else told.doing.get(node, ""))
    if not told.notes:
        table.add_row("", "", "", "", "", next(reversed(told.doing.values()), "beginning"))
    return table


def show_run(run: Run) -> None:
    what = f"{'back to' if run.asked.get('back') else run.kind} {run.target} on {run.fleet}"
    typer.echo(f"run {run.id}: {what}, by {', '.join(run.operators)}: {run.result or 'open'}")
    table = Table("node", "from, to", "state", "attempts", "out of rotation", "why")
    for name, walk in sorted(run.walks.items()):
        versions = f"{walk.previous} → {walk.target}"
        table.add_row(name, versions, walk.state, str(walk.attempts), f"{out_of_rotation(walk):.0f} s", walk.reason)
    console().print(table)
    typer.echo(f"record whole; its last line has SHA-256 {run.head}")


def records(project: Path) -> list[Path]:
    """The records of this project's runs, the last one first: their names begin with the time."""
    return sorted((project / ".gpuyard/runs").glob(f"*/{RECORD}"), reverse=True)
