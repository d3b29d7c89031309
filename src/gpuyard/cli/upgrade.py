"""The commands `gpuyard upgrade …` and `gpuyard runs …`: a rollout's playbooks, watched, and what they left behind."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gpuyard.cli.lab import Stack, console, project_of
from gpuyard.cli.play import Play, Told, interrupts, played
from gpuyard.cli.refusals import FINDINGS, REFUSED, refusals_told
from gpuyard.cli.write import write
from gpuyard.spec.errors import RefusedError
from gpuyard.upgrade.record import RecordError
from gpuyard.upgrade.report import html
from gpuyard.upgrade.runs import AT_REST, Run, out_of_rotation, run_of, typical
from gpuyard.upgrade.waves import UpgradeError

RECORD = "record.jsonl"
REPORT = "report.html"
UNITS = {"s": 1, "m": 60, "h": 3600}

app = typer.Typer(name="upgrade", help="Change the driver of a fleet that serves.", no_args_is_help=True)
runs_app = typer.Typer(name="runs", help="The records of what was changed.", invoke_without_command=True)

AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not show the plan first, and do not ask.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print what ansible prints, at the end.")]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Take a rollout from an operator who is gone for good.")]
AnyRun = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Id of the run. Without it, the last.")]


def seconds_given(text: str) -> str:
    match = re.fullmatch(r"([0-9]{1,6})(s|m|h)?", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is no time; for example 600s, 10m, 1h")
    return str(int(match[1]) * UNITS[match[2] or "s"])


@app.command()
def driver(
    canary: Annotated[int, typer.Option(min=0, help="Nodes that change, and are watched, before all others.")] = 1,
    max_unavailable: Annotated[str, typer.Option(help='Most nodes out at once: a number, or a share like "25%".')] = (
        "25%"
    ),
    soak: Annotated[str, typer.Option(callback=seconds_given, help="How long a canary is watched: 600s, 10m.")] = "10m",
    limit: Annotated[str, typer.Option(help="Only these nodes, as ansible's --limit.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Show the plan, or why there is none; change nothing.")
    ] = False,
    accept_downtime: Annotated[
        bool, typer.Option("--accept-downtime", help="Consent to have no node of a model in service for a while.")
    ] = False,
    allow_downgrade: Annotated[bool, typer.Option("--allow-downgrade", help="Consent to an older driver.")] = False,
    take_over: TakeOver = False,
    yes: Yes = False,
    verbose: Verbose = False,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """Bring every node to the driver of the lock, wave after wave, while the others serve.

    Ctrl-C once: it stops before its next node, and all serve. Twice: it stops at once. Both times
    `gpuyard upgrade resume` goes on.
    """
    words = {
        "upgrade_canary": str(canary),
        "upgrade_max_unavailable": max_unavailable,
        "upgrade_soak_seconds": soak,
        "upgrade_soak_every": str(min(30, max(int(soak), 1))),
        **consents(upgrade_accept_downtime=accept_downtime, nvidia_driver_allow_downgrade=allow_downgrade),
        **consents(upgrade_take_over=take_over),
    }
    with refusals_told(as_json):
        Rollout(stack, "upgrade_driver", words, limit, verbose, as_json).go(check=check, yes=yes)


@app.command()
def status(run: AnyRun = None, stack: Stack = "lab", as_json: AsJson = False) -> None:
    """Ask the nodes where they stand, and the gateway who changes the fleet."""
    with refusals_told(as_json):
        told = played(project_of(), stack, "upgrade_status", [])
        refuse_unless_played(told)
        claim = told.claim
        if run and claim.get("run") != run:
            last = claim.get("run", "none")
            change = f"`gpuyard runs show {run}` has its record"
            raise UpgradeError("UPGRADE-NOT-RUNNING", f"run {run}", f"the last of this fleet is {last}", change)
        if as_json:
            typer.echo(json.dumps({"claim": claim, "nodes": told.notes}, indent=2))
            return
        typer.echo(claim_told(claim))
        table = Table("node", "state", "since", "driver before", "driver after", "attempts", "why")
        for node, note in sorted(told.notes.items()):
            drivers = note["previous"]["version"], note["target"]["version"]
            table.add_row(node, note["state"], note["at"], *drivers, str(note["attempts"]), note["reason"])
        console().print(table)


@app.command()
def pause(run: AnyRun = None, stack: Stack = "lab") -> None:
    """Let the rollout stop before its next node; what has begun is ended, and all nodes serve then."""
    with refusals_told():
        told = played(project_of(), stack, "pause_upgrade", ["-e", f"pause_upgrade_run={run}"] if run else [])
        refuse_unless_played(told)
        paused = told.claim["run"]
        typer.echo(f"run {paused} stops before its next node; `gpuyard upgrade resume {paused}` lets it go on")


@app.command()
def resume(
    run: AnyRun = None,
    take_over: TakeOver = False,
    yes: Yes = False,
    verbose: Verbose = False,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was paused, interrupted or killed, as it was asked for when it began."""
    with refusals_told(as_json):
        found = the_run(project_of(), run)
        if found.result == "done":
            raise UpgradeError("UPGRADE-NOT-RUNNING", f"run {found.id}", "it came to its end", "begin another one")
        words = {**words_of(found), "upgrade_resume": "true", **consents(upgrade_take_over=take_over)}
        playbook = "rollback_driver" if found.asked.get("back") else "upgrade_driver"
        limit = str(found.asked.get("limit") or "")
        Rollout(stack, playbook, words, limit, verbose, as_json).go(check=False, yes=yes)


@app.command()
def rollback(
    run: AnyRun = None,
    yes: Yes = False,
    verbose: Verbose = False,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """Bring the nodes that a run has changed back to the driver that they came from."""
    with refusals_told(as_json):
        project = project_of()
        found, last = the_run(project, run), the_run(project, None)
        nodes = sorted(name for name, walk in found.walks.items() if walk.state == "upgrade-done")
        if found.id != last.id:
            why = f"run {last.id} came after it, and a node remembers one way back"
            raise UpgradeError("UPGRADE-NOTHING-BACK", f"run {found.id}", why, f"go back from {last.id} first")
        if found.asked.get("back") or not nodes:
            why = "it went back itself" if found.asked.get("back") else "no node came to another driver in it"
            raise UpgradeError("UPGRADE-NOTHING-BACK", f"run {found.id}", why, "`gpuyard runs` lists the others")
        Rollout(stack, "rollback_driver", words_of(found), ",".join(nodes), verbose, as_json).go(check=False, yes=yes)


@runs_app.callback()
def runs(context: typer.Context, as_json: AsJson = False) -> None:
    """List the runs that were begun from this project, the last one first."""
    if context.invoked_subcommand:
        return
    with refusals_told(as_json):
        found = [run_of(path) for path in records(project_of())]
        if as_json:
            typer.echo(json.dumps([run.as_dict() for run in found], indent=2))
            return
        if not found:
            typer.echo("nothing was changed from here yet; `gpuyard upgrade driver` begins")
            return
        table = Table("run", "fleet", "to", "begun", "took", "result", "nodes done")
        for run in found:
            took = f"{(run.ended - run.begun).total_seconds():.0f} s" if run.ended else "-"
            done = sum(walk.state == "upgrade-done" for walk in run.walks.values())
            to = f"{'back to ' if run.asked.get('back') else ''}{run.target}"
            begun = f"{run.begun:%Y-%m-%d %H:%M}"
            table.add_row(run.id, run.fleet, to, begun, took, run.result or "open", f"{done}/{len(run.walks)}")
        console().print(table)


@runs_app.command()
def show(
    run: AnyRun = None,
    report: Annotated[Path | None, typer.Option(help="Write the page with its timeline to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run from its record, whose chain of hashes is proven: states, times, reasons."""
    with refusals_told(as_json):
        found = the_run(project_of(), run)
        if report:
            write(report, html(found))
            typer.echo(f"report: {report}", err=True)
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=2))
        else:
            show_run(found)


# --- a rollout, watched ---------------------------------------------------------------------------------------


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

        def interrupted(times: int) -> None:
            if times == 1:
                self.console.print("stopping before the next node; Ctrl-C again stops at once")
                # Not from within the handler of a signal: the playbook that pauses takes seconds.
                pauses.append(Play(self.project, self.stack, "pause_upgrade", []))
            else:
                play.kill()

        pauses: list[Play] = []
        with interrupts(interrupted):
            self.watch(play, usual)
            for pausing in pauses:
                pausing.wait()
        self.end(play.told)

    def runs(self) -> list[Run]:
        found: list[Run] = []
        for path in records(self.project):
            try:
                found.append(run_of(path))
            except RecordError:
                continue  # `gpuyard runs` tells of it; how long things usually take can do without
        return found

    def watch(self, play: Play, usual: Mapping[str, float]) -> None:
        told, lines = play.told, 0
        if self.console.is_terminal:
            with Live(console=self.console, get_renderable=lambda: view(told, usual), refresh_per_second=2):
                while not play.ended(0.5):
                    pass
            return
        while True:
            ended = play.ended(0.5)
            for node, state in told.moved[lines:]:
                typer.echo(f"{datetime.now(UTC):%H:%M:%S} {node} {state}", err=True)
                lines += 1
            if ended:
                return

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
        "node", "driver", "state", "for", "usually", "doing", title=told.claim.get("run"), title_justify="left"
    )
    for node, note in sorted(told.notes.items()):
        state = note["state"]
        rests = state in AT_REST
        spent = "" if rests else f"{now - told.since[node]:.0f} s"
        expected = f"{usual[state]:.0f} s" if state in usual and not rests else ""
        drivers = f"{note['previous']['version']} → {note['target']['version']}"
        table.add_row(node, drivers, state, spent, expected, "" if rests else told.doing.get(node, ""))
    if not told.notes:
        table.add_row("", "", "", "", "", next(reversed(told.doing.values()), "beginning"))
    return table


def show_run(run: Run) -> None:
    what = f"{'back to' if run.asked.get('back') else run.kind} {run.target} on {run.fleet}"
    typer.echo(f"run {run.id}: {what}, by {', '.join(run.operators)}: {run.result or 'open'}")
    table = Table("node", "driver", "state", "attempts", "out of rotation", "why")
    for name, walk in sorted(run.walks.items()):
        drivers = f"{walk.previous} → {walk.target}"
        table.add_row(name, drivers, walk.state, str(walk.attempts), f"{out_of_rotation(walk):.0f} s", walk.reason)
    console().print(table)
    typer.echo(f"record whole; its last line has SHA-256 {run.head}")


# --- what there is ----------------------------------------------------------------------------------------------


def records(project: Path) -> list[Path]:
    """The records of this project's runs, the last one first: their names begin with the time."""
    return sorted((project / ".gpuyard/runs").glob(f"*/{RECORD}"), reverse=True)


def the_run(project: Path, name: str | None) -> Run:
    """The run of that name, or the last one. Raises RecordError where there is none."""
    found = {path.parent.name: path for path in records(project)}
    if not name and found:
        return run_of(next(iter(found.values())))
    if name not in found:
        known = ", ".join(list(found)[:3]) or "none"
        change = f"the last are {known}; a run is recorded where its operator was"
        raise RecordError("RECORD-MISSING", f"run {name or ''}".strip(), "it was not begun from this project", change)
    return run_of(found[name])


def words_of(run: Run) -> dict[str, str]:
    """The variables that a run was begun with."""
    asked = run.asked
    return {
        "upgrade_canary": str(asked["policy"]["canary"]),
        "upgrade_max_unavailable": str(asked["policy"]["max_unavailable"]),
        "upgrade_soak_seconds": str(asked["soak_seconds"]),
        "upgrade_soak_every": str(asked["soak_every"]),
        **consents(
            upgrade_accept_downtime=str(asked["policy"]["accept_downtime"]).lower() in ("true", "yes", "1"),
            nvidia_driver_allow_downgrade=bool(asked["allow_downgrade"]) and not asked["back"],
        ),
    }


def consents(**given: bool) -> dict[str, str]:
    return {name: "true" for name, is_given in given.items() if is_given}


def claim_told(claim: Mapping[str, Any]) -> str:
    if not claim:
        return "nobody has changed this fleet yet"
    who = "{name}@{host}".format(**claim["operator"])
    how = claim["result"] or ("paused" if claim["paused"] else "open")
    return f"run {claim['run']}: {claim['kind']} to {claim['target']}, by {who} since {claim['begun']}: {how}"


def refuse_unless_played(told: Told) -> None:
    if not told.rc:
        return
    first = told.failures[0] if told.failures else ""
    rule, colon, rest = first.partition(": ")
    if not colon or not re.fullmatch(r"[A-Z][A-Z0-9-]+", rule):
        rule, rest = "CLI-PLAYBOOK", first or f"ansible-playbook ended with {told.rc}"
    raise RefusedError(rule, rest, "the playbook stopped there", f"{told.output} has all that it printed")
