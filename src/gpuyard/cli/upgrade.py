"""The commands `gpuyard upgrade …` and `gpuyard runs …`: a rollout's playbooks, watched, and what they left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gpuyard.cli.lab import Stack, console, project_of
from gpuyard.cli.play import Told, played
from gpuyard.cli.refusals import refusals_told
from gpuyard.cli.rollout import Rollout, records, show_run
from gpuyard.cli.write import write
from gpuyard.spec.errors import RefusedError
from gpuyard.upgrade.record import RecordError
from gpuyard.upgrade.report import html
from gpuyard.upgrade.runs import Run, run_of
from gpuyard.upgrade.waves import UpgradeError

UNITS = {"s": 1, "m": 60, "h": 3600}

app = typer.Typer(name="upgrade", help="Change driver, engines or kernel of a fleet that serves.", no_args_is_help=True)
runs_app = typer.Typer(name="runs", help="The records of what was changed.", invoke_without_command=True)

AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not show the plan first, and do not ask.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print what ansible prints, at the end.")]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Take a rollout from an operator who is gone for good.")]
AnyRun = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Id of the run. Without it, the last.")]


def register(root: typer.Typer) -> None:
    root.add_typer(app)
    root.add_typer(runs_app)


def seconds_given(text: str) -> str:
    match = re.fullmatch(r"([0-9]{1,6})(s|m|h)?", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is no time; for example 600s, 10m, 1h")
    return str(int(match[1]) * UNITS[match[2] or "s"])


Canary = Annotated[int, typer.Option(min=0, help="Nodes that change, and are watched, before all others.")]
MaxUnavailable = Annotated[str, typer.Option(help='Most nodes out at once: a number, or a share like "25%".')]
Soak = Annotated[str, typer.Option(callback=seconds_given, help="How long a canary is watched: 600s, 10m.")]
Limit = Annotated[str, typer.Option(help="Only these nodes, as ansible's --limit.")]
Check = Annotated[bool, typer.Option("--check", help="Show the plan, or why there is none; change nothing.")]
AcceptDowntime = Annotated[
    bool, typer.Option("--accept-downtime", help="Consent to have no node of a model in service for a while.")
]


@app.command()
def driver(
    canary: Canary = 1,
    max_unavailable: MaxUnavailable = "25%",
    soak: Soak = "10m",
    limit: Limit = "",
    check: Check = False,
    accept_downtime: AcceptDowntime = False,
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
        **policy(canary, max_unavailable, soak),
        **consents(
            upgrade_accept_downtime=accept_downtime,
            nvidia_driver_allow_downgrade=allow_downgrade,
            upgrade_take_over=take_over,
        ),
    }
    with refusals_told(as_json):
        Rollout(stack, "upgrade_driver", words, limit, verbose, as_json).go(check=check, yes=yes)


@app.command()
def engine(
    canary: Canary = 1,
    max_unavailable: MaxUnavailable = "25%",
    soak: Soak = "10m",
    limit: Limit = "",
    check: Check = False,
    accept_downtime: AcceptDowntime = False,
    allow_other_answers: Annotated[
        bool, typer.Option("--allow-other-answers", help="Consent to answers that are others than before, or slower.")
    ] = False,
    take_over: TakeOver = False,
    yes: Yes = False,
    verbose: Verbose = False,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """Bring the engines of every node to the lock: another version, or other settings, while the others serve."""
    words = {
        **policy(canary, max_unavailable, soak),
        **consents(
            upgrade_accept_downtime=accept_downtime,
            vllm_server_allow_other_answers=allow_other_answers,
            upgrade_take_over=take_over,
        ),
    }
    with refusals_told(as_json):
        Rollout(stack, "upgrade_engine", words, limit, verbose, as_json).go(check=check, yes=yes)


@app.command()
def kernel(
    canary: Canary = 1,
    max_unavailable: MaxUnavailable = "25%",
    soak: Soak = "10m",
    limit: Limit = "",
    check: Check = False,
    accept_downtime: AcceptDowntime = False,
    allow_reboot: Annotated[
        bool, typer.Option("--allow-reboot", help="Consent to reboot each node, once it is empty.")
    ] = False,
    take_over: TakeOver = False,
    yes: Yes = False,
    verbose: Verbose = False,
    stack: Stack = "lab",
    as_json: AsJson = False,
) -> None:
    """Bring every node to the kernel of the lock: built and installed while it serves, booted once, kept if proven."""
    words = {
        **policy(canary, max_unavailable, soak),
        **consents(
            upgrade_accept_downtime=accept_downtime,
            node_kernel_allow_reboot=allow_reboot,
            upgrade_take_over=take_over,
        ),
    }
    with refusals_told(as_json):
        Rollout(stack, "upgrade_kernel", words, limit, verbose, as_json).go(check=check, yes=yes)


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
        table = Table("node", "state", "since", "before", "after", "attempts", "why")
        for node, note in sorted(told.notes.items()):
            versions = note["previous"]["version"], note["target"]["version"]
            table.add_row(node, note["state"], note["at"], *versions, str(note["attempts"]), note["reason"])
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
        playbook = f"{'rollback' if found.asked.get('back') else 'upgrade'}_{found.kind}"
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
    """Bring the nodes on which a run has changed the driver back to the one that they came from."""
    with refusals_told(as_json):
        project = project_of()
        last = last_change(project)
        found = the_run(project, run) if run else last
        nodes = sorted(name for name, walk in found.walks.items() if walk.state == "upgrade-done")
        if found.id != last.id:
            why = f"run {last.id} came after it, and a node remembers one way back"
            raise UpgradeError("UPGRADE-NOTHING-BACK", f"run {found.id}", why, f"go back from {last.id} first")
        if found.kind != "driver":
            why = "what it came from is named by no note but by the lock"
            change = f"ask for the old {found.kind} in the spec, `gpuyard lock`, and `gpuyard upgrade {found.kind}`"
            raise UpgradeError("UPGRADE-NOTHING-BACK", f"run {found.id}", why, change)
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


# --- what there is ----------------------------------------------------------------------------------------------


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


def last_change(project: Path) -> Run:
    """The last run in which a node was begun; one that found nothing to do is nothing to go back from."""
    return next((run for run in map(run_of, records(project)) if run.walks), None) or the_run(project, None)


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
            vllm_server_allow_other_answers=bool(asked.get("allow_other_answers")),
            node_kernel_allow_reboot=bool(asked.get("allow_reboot")),
        ),
    }


def policy(canary: int, max_unavailable: str, soak: str) -> dict[str, str]:
    return {
        "upgrade_canary": str(canary),
        "upgrade_max_unavailable": max_unavailable,
        "upgrade_soak_seconds": soak,
        "upgrade_soak_every": str(min(30, max(int(soak), 1))),
    }


def consents(**given: bool) -> dict[str, str]:
    return {name: "true" for name, is_given in given.items() if is_given}


def claim_told(claim: Mapping[str, Any]) -> str:
    if not claim:
        return "nobody has changed this fleet yet"
    who = "{name}@{host}".format(**claim["operator"])
    how = claim["result"] or ("paused" if claim["paused"] else "halting" if claim["halting"] else "open")
    return f"run {claim['run']}: {claim['kind']} to {claim['target']}, by {who} since {claim['begun']}: {how}"


def refuse_unless_played(told: Told) -> None:
    if not told.rc:
        return
    first = told.failures[0] if told.failures else ""
    rule, colon, rest = first.partition(": ")
    if not colon or not re.fullmatch(r"[A-Z][A-Z0-9-]+", rule):
        rule, rest = "CLI-PLAYBOOK", first or f"ansible-playbook ended with {told.rc}"
    raise RefusedError(rule, rest, "the playbook stopped there", f"{told.output} has all that it printed")
