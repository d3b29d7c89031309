"""`gpuyard rehearse`: a user's own fleet, made small, brought to another driver in the lab under load, with faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from gpuyard.catalog import load_catalog
from gpuyard.cli.lab import console, project_of
from gpuyard.cli.plan import FleetFile, newest
from gpuyard.cli.play import RULE
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.cli.rollout import RECORD
from gpuyard.cli.upgrade import AcceptDowntime, Canary, MaxUnavailable, policy, seconds_given
from gpuyard.cli.write import write
from gpuyard.lab.errors import LabError
from gpuyard.lab.own_fleet import LOST, CommandError, OwnFleet, Run, load, own_fleet, wait
from gpuyard.lab.place import default_cache
from gpuyard.upgrade import report as run_report
from gpuyard.upgrade.rehearsal import Drivers, RehearsalError, Scaled, Scene, html, scaled, told
from gpuyard.upgrade.runs import run_of

STACK = "rehearsal"
WEIGHTS = "smollm2-135m-instruct"
RATE = 10
"""Requests a second."""


def register(app: typer.Typer) -> None:
    app.command()(rehearse)


def rehearse(
    fleet: FleetFile,
    upgrade: Annotated[str, typer.Option("--upgrade", help="What is upgraded: driver.")] = "driver",
    come_from: Annotated[str, typer.Option("--from", help="Driver to come from; left out, that of the lock.")] = "",
    nodes: Annotated[int, typer.Option(min=1, max=8, help="Most nodes of a pool in the lab.")] = 3,
    canary: Canary = 1,
    max_unavailable: MaxUnavailable = "25%",
    soak: Annotated[str, typer.Option(callback=seconds_given, help="How long a canary is watched: 5s, 10m.")] = "5s",
    accept_downtime: AcceptDowntime = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Rehearse a driver upgrade of a fleet in the lab: one that fails, one whose operator is killed, and the way back.

    The fleet is made small, its models and engines are simulated; playbooks, waves and gates are those of production.
    """
    if upgrade != "driver":
        raise typer.BadParameter(f"{upgrade!r} cannot be rehearsed; driver can", param_hint="--upgrade")
    words = {**policy(canary, max_unavailable, soak), "upgrade_confirm": "false"}
    if accept_downtime:
        words["upgrade_accept_downtime"] = "true"
    with refusals_told(as_json):
        project = project_of()
        wish, before, after = newest(fleet, "driver")
        come_from = come_from or before
        if not come_from:
            change = f"`gpuyard lock {fleet}` before you ask for another driver, or name it with --from"
            raise RehearsalError("REHEARSE-LOCK", f"{fleet} has no lock", "the driver it comes from is unknown", change)
        asked = Drivers(come_from, after)
        small = scaled(wish, asked, stack=STACK, nodes=nodes, **of_the_lab(project))
        for note in small.notes:
            typer.echo(f"in the lab: {note}", err=True)
        with tidily(), own_fleet(STACK, project) as own:
            rehearsal = Rehearsal(own, small, words)
            scenes = rehearsal.play()
            found = told(wish.name, asked, small, scenes)
            page = rehearsal.keep(project, found)
        if as_json:
            typer.echo(json.dumps({**found, "report": str(page)}, indent=2))
        else:
            show(found)
            typer.echo(f"report: {page}")
        if not found["good"] or (found["lost"] and not accept_downtime):
            raise typer.Exit(FINDINGS)


def of_the_lab(project: Path) -> dict[str, Any]:
    """What the lab carries and simulates, and until when its branches are used."""
    rows = [row.drivers for row in load_catalog().repositories if row.provider == "lab" and row.drivers]
    boards = yaml.safe_load((project / "roles/lab_gpu/vars/main.yml").read_text())["__lab_gpu_boards"]
    until = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    return {"carried": rows[0], "boards": set(boards), "until": until}


@contextmanager
def tidily() -> Generator[None]:
    """What a command of the rehearsal ended with is told as a refusal."""
    try:
        yield
    except CommandError as error:
        change = "`make lab` shows whether the lab itself is well"
        raise LabError("REHEARSE-FAILED", str(error), change=change) from error


@dataclass
class Rehearsal:
    """The scenes, on a fleet that is up."""

    own: OwnFleet
    small: Scaled
    words: dict[str, str]
    gpu_nodes: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        for pool in self.small.spec["pools"]:
            self.gpu_nodes += [f"{STACK}-{pool['name']}-{index}" for index in range(pool["nodes"])]
        self.drivers = self.small.drivers
        models = self.own.project / ".gpuyard/models"
        models.mkdir()
        for model in self.small.spec["models"]:
            (models / model["name"]).symlink_to(default_cache() / "models" / WEIGHTS)

    def play(self) -> list[Scene]:
        self.lock(self.drivers.before)
        self.own.done("gpuyard", "lab", "up", "--stack", STACK)
        self.lock(self.drivers.after)
        scenes = (self.a_module_that_does_not_build, self.an_operator_who_is_killed, self.the_way_back)
        return [scene() for scene in scenes]

    def lock(self, driver: str) -> None:
        spec = {**self.small.spec, "driver": {**self.small.spec["driver"], "version": driver}}
        spec["gateway"] = {**spec["gateway"], "port": self.own.port}
        (self.own.project / f"fleets/{STACK}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        self.own.lock()

    # --- scenes ---

    def a_module_that_does_not_build(self) -> Scene:
        """On the first node that is changed: it goes back, and no other is touched."""
        fault = (self.gpu_nodes[0], "dkms-build-fails")
        self.own.done("gpuyard", "lab", "break", "--stack", STACK, *fault, f"version={self.drivers.after}")

        def change() -> Run:
            return self.own.run("ansible-playbook", *self.line())

        def came(run: Run) -> str:
            state = self.own.note(self.gpu_nodes[0]).get("state")
            if run.rc and state == "rollback-done" and self.all_on(self.drivers.before):
                return "rolled back, no other node touched"
            return f"ended with {run.rc}, the node at {state}"

        scene = self.scene("its module does not build", "rolled back, no other node touched", change, came)
        self.own.done("gpuyard", "lab", "mend", "--stack", STACK, *fault)
        return scene

    def an_operator_who_is_killed(self) -> Scene:
        """While the first node is without a driver. The same command goes on, and all nodes come to the new one."""

        def change() -> Run:
            operator = subprocess.Popen(
                self.own.words("ansible-playbook", *self.line()),
                cwd=self.own.project,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            state = "driver-install-required"

            def there() -> bool:
                return operator.poll() is not None or self.own.note(self.gpu_nodes[0]).get("state") == state

            try:
                wait(state, there, 600)
            finally:
                if operator.poll() is None:
                    os.killpg(operator.pid, signal.SIGKILL)
                    operator.wait()
            return self.own.run("ansible-playbook", *self.line())

        def came(run: Run) -> str:
            attempts = self.own.note(self.gpu_nodes[0]).get("attempts", 0)
            done = run.rc == 0 and self.all_on(self.drivers.after) and attempts > 1
            return "gone on, every node done" if done else f"ended with {run.rc}, after {attempts} attempt(s)"

        return self.scene("its operator is killed", "gone on, every node done", change, came)

    def the_way_back(self) -> Scene:
        def change() -> Run:
            return self.own.run("ansible-playbook", *self.line("rollback_driver"))

        def came(run: Run) -> str:
            back = run.rc == 0 and self.all_on(self.drivers.before)
            return "every node back" if back else f"ended with {run.rc}"

        return self.scene("all goes back", "every node back", change, came)

    # --- their parts ---

    def scene(self, name: str, expected: str, change: Callable[[], Run], came: Callable[[Run], str]) -> Scene:
        self.own.say(f"scene: {name}")
        with load(self.own, RATE) as seen:
            run = change()
        lost = sum(seen[kind] for kind in LOST)
        found = Scene(name, expected, came(run), seen["requests"], lost, round(run.seconds, 1))
        if not found.good:
            self.own.say("\n".join([f"not as expected: {found.came}", *said(run)]))
        return found

    def line(self, playbook: str = "upgrade_driver") -> list[str]:
        values = [word for name, value in self.words.items() for word in ("-e", f"{name}={value}")]
        return ["-i", f"inventories/{STACK}", f"playbooks/operate/{playbook}.yml", *values]

    def all_on(self, driver: str) -> bool:
        line = "modinfo -F version nvidia; nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        return all(set(self.own.on(node, line).split()) == {driver} for node in self.gpu_nodes)

    def keep(self, project: Path, found: dict[str, Any]) -> Path:
        """The report and the record of each run, in the user's own project."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = project / ".gpuyard/rehearsals" / f"{moment}-{found['fleet']}"
        pages: list[str] = []
        for record in sorted((self.own.project / ".gpuyard/runs").glob(f"*/{RECORD}")):
            run = run_of(record)
            home = folder / run.id
            home.mkdir(parents=True)
            shutil.copy(record, home / RECORD)
            write(home / "report.html", run_report.html(run))
            pages.append(f"{run.id}/report.html")
        write(folder / "report.json", json.dumps(found, indent=2) + "\n")
        write(folder / "report.html", html(found, pages))
        return folder / "report.html"


def said(run: Run) -> list[str]:
    """The lines of a playbook that say why it stopped; without one, its last lines."""
    lines = run.output.splitlines()
    return [line.strip() for line in lines if RULE.search(line)][:5] or lines[-20:]


def show(found: dict[str, Any]) -> None:
    table = Table("scene", "came", "as expected", "requests", "lost", "seconds")
    for scene in found["scenes"]:
        good = "yes" if scene["good"] else "no"
        counts = (str(scene["requests"]), str(scene["lost"]), f"{scene['seconds']:.0f}")
        table.add_row(scene["name"], scene["came"], good, *counts)
    console().print(table)
    versions = "driver {before} to {after}".format(**found["rehearsed"])
    print(f"{found['fleet']}, {versions}: {found['requests']} requests, {found['lost']} lost", file=sys.stdout)
