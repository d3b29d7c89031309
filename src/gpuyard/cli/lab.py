"""The commands `gpuyard lab …`: the whole walk in one command, and a look at what it made."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.lab import agent, look
from gpuyard.lab.errors import LabError
from gpuyard.lab.models import LabRef, NodeState
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

USAGE = 2
QUESTION = "What is the capital of France?"

app = typer.Typer(name="lab", help="A whole fleet of simulated GPU machines on this computer.", no_args_is_help=True)

Stack = Annotated[str, typer.Option("--stack", help="The Pulumi stack; its fleet is fleets/<stack>.yaml.")]


@app.command()
def up(stack: Stack = "lab") -> None:
    """Provision, converge and verify the fleet, ask it a question, and show how it stands."""
    with refusals_told():
        walk = Walk(stack)
        walk.step("provision", "pulumi", "stack", "select", "--create", stack)
        cancel_a_dead_update(walk)
        walk.step("provision", "pulumi", "up", "--yes", "--skip-preview", "--stack", stack)
        inventory = f"inventories/{stack}"
        walk.step("converge", "ansible-playbook", "-i", inventory, "playbooks/site.yml")
        walk.step("verify", "ansible-playbook", "-i", inventory, "playbooks/verify.yml")
        with walk.timed("ask"):
            typer.echo(f"↳ gpuyard lab ask {QUESTION!r}")
            typer.secho(answer_of(walk.project, walk.fleet, QUESTION), bold=True)
        with walk.timed("status"):
            table_of(status_of(walk.lab))
        walk.tell_times()


@app.command()
def down(stack: Stack = "lab") -> None:
    """Destroy the fleet and leave no mount, process, bridge or rule of it."""
    with refusals_told():
        walk = Walk(stack)
        destroyed = True
        if stack_exists(walk):
            cancel_a_dead_update(walk)
            destroyed = walk.run("destroy", "pulumi", "destroy", "--yes", "--skip-preview", "--stack", stack) == 0
        # Also what Pulumi does not know of: a node of a killed update, a network whose state was lost.
        with walk.timed("sweep"):
            agent.lab_down(walk.lab)
        if not destroyed:
            typer.secho("the lab is gone; Pulumi did not take note and will at the next `pulumi up`", err=True)
            raise typer.Exit(FINDINGS)


@app.command()
def status(
    stack: Stack = "lab",
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Show every node: whether it runs, its driver, its engines, and what the gateway thinks of it."""
    with refusals_told():
        rows = status_of(lab_of(stack))
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
        else:
            table_of(rows)
        if not all(row["running"] for row in rows):
            raise typer.Exit(FINDINGS)


@app.command(context_settings={"ignore_unknown_options": True})
def ssh(
    node: Annotated[str, typer.Argument(help="The node's name, e.g. lab-chat-0.")],
    command: Annotated[list[str] | None, typer.Argument(help="What to run there; without it, a shell.")] = None,
    stack: Stack = "lab",
) -> None:
    """Log in to a node as root, its host key checked. Ends with the exit code of what ran there."""
    with refusals_told():
        lab = lab_of(stack)
        words = [*agent.login(lab, node_named(lab, node)), *(command or [])]
    os.execvp(words[0], words)  # noqa: S606 - the user's own words go to the user's own machine


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask the model.")] = QUESTION,
    stack: Stack = "lab",
) -> None:
    """Ask the fleet's first model through the gateway and print its answer."""
    with refusals_told():
        project = project_of()
        typer.echo(answer_of(project, load_fleet(project / "fleets" / f"{stack}.yaml"), question))


# --- the walk --------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """The ordinary commands, one after the other, as a user would type them; each is printed, and timed."""

    stack: str
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        self.project = project_of()
        self.fleet = load_fleet(self.project / "fleets" / f"{self.stack}.yaml")
        self.lab = LabRef(project=self.project, stack=self.stack)

    @contextmanager
    def timed(self, step: str) -> Generator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0) + time.monotonic() - began

    def run(self, step: str, *command: str) -> int:
        if not shutil.which(command[0]):
            raise LabError("LAB-ACTIVATE", f"{command[0]} is not on the PATH", change="run `. ./activate`")
        typer.echo(f"↳ {' '.join(command)}")
        with self.timed(step):
            # A line of our own that is still in a buffer would come after what the command prints.
            sys.stdout.flush()
            code = subprocess.run(command, cwd=self.project, check=False).returncode
        typer.echo(f"  {step}: {self.seconds[step]:.0f} s")
        return code

    def step(self, step: str, *command: str) -> None:
        if code := self.run(step, *command):
            self.tell_times()
            typer.secho(f"stopped: `{' '.join(command)}` ended with {code}", err=True)
            raise typer.Exit(FINDINGS)

    def tell_times(self) -> None:
        told = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in self.seconds.items())
        typer.echo(f"time: {told}; together {sum(self.seconds.values()):.0f} s")


def cancel_a_dead_update(walk: Walk) -> None:
    """Take away the lock of an update that was killed. One that is alive keeps it, and Pulumi will say so."""
    locks = walk.project / ".gpuyard/pulumi/.pulumi/locks"
    for lock in locks.glob(f"**/{walk.stack}/*.json"):
        try:
            holder = json.loads(lock.read_text())
        except (OSError, ValueError):
            continue
        if holder.get("hostname") == socket.gethostname() and not is_pulumi(holder.get("pid")):
            walk.step("provision", "pulumi", "cancel", "--yes", "--stack", walk.stack)
            return


def is_pulumi(pid: object) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "pulumi"
    except OSError:
        return False


def stack_exists(walk: Walk) -> bool:
    if not shutil.which("pulumi"):
        raise LabError("LAB-ACTIVATE", "pulumi is not on the PATH", change="run `. ./activate`")
    listing = subprocess.run(
        ["pulumi", "stack", "ls", "--json"], cwd=walk.project, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        raise LabError("LAB-PULUMI", "`pulumi stack ls` failed", listing.stderr.strip())
    return any(stack["name"].rsplit("/", 1)[-1] == walk.stack for stack in json.loads(listing.stdout))


# --- what there is -----------------------------------------------------------------------------------------


def project_of() -> Path:
    """The project one is in: the folder of Pulumi.yaml, here or above, or the one that `activate` named."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "Pulumi.yaml").is_file():
            return folder
    if named := os.environ.get("GPUYARD_PROJECT"):
        return Path(named)
    raise LabError("LAB-PROJECT", f"no Pulumi.yaml in {here} or above", change="go to the project's folder")


def lab_of(stack: str) -> LabRef:
    return LabRef(project=project_of(), stack=stack)


def node_named(lab: LabRef, name: str) -> NodeState:
    nodes = {node.name: node for node in agent.nodes_read(lab)}
    if name in nodes:
        return nodes[name]
    near = difflib.get_close_matches(name, nodes, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(nodes) or 'none; run `gpuyard lab up`'}"
    typer.secho(f"LAB-UNKNOWN: no node {name} in {lab.stack}; {hint}", err=True)
    raise typer.Exit(USAGE)


def status_of(lab: LabRef) -> list[dict[str, Any]]:
    nodes = agent.nodes_read(lab)
    if not nodes:
        raise LabError("LAB-EMPTY", f"the lab {lab.stack} has no nodes", change="run `gpuyard lab up`")
    said = {node.name: ask_node(lab, node) if node.running else {} for node in nodes}
    servers: dict[str, str] = {}
    for answer in said.values():
        servers |= answer.get("servers") or {}
    return [
        {
            "node": node.name,
            "role": node.spec.role,
            "address": node.address,
            "running": node.running,
            "driver": said[node.name].get("driver"),
            "engines": said[node.name].get("engines") or {},
            "gateway": servers.get(node.name),
        }
        for node in nodes
    ]


def ask_node(lab: LabRef, node: NodeState) -> dict[str, Any]:
    """What a node says of itself; nothing when it does not answer."""
    command = [*agent.login(lab, node), "python3", "-"]
    with Path(look.__file__).open() as script:
        try:
            done = subprocess.run(command, stdin=script, capture_output=True, text=True, check=False, timeout=20)
        except subprocess.TimeoutExpired:
            return {}
    return json.loads(done.stdout) if done.returncode == 0 else {}


def table_of(rows: list[dict[str, Any]]) -> None:
    table = Table("node", "role", "address", "running", "driver", "engines", "gateway says")
    for row in rows:
        engines = ", ".join(f"{model} {state}" for model, state in row["engines"].items())
        words = (row["driver"] or "-", engines or "-", row["gateway"] or "-")
        table.add_row(row["node"], row["role"], row["address"], "yes" if row["running"] else "no", *words)
    console().print(table)


def console() -> Console:
    # A table in a log is as wide as it needs to be; only a terminal has a width of its own.
    return Console(width=None if sys.stdout.isatty() else 140)


# --- asking -------------------------------------------------------------------------------------------------


def answer_of(project: Path, fleet: Fleet, question: str) -> str:
    """One question to the fleet's first model, as any client would ask it."""
    key_file = project / ".gpuyard/secrets" / fleet.name / "api_key"
    try:
        key = key_file.read_text().strip()
    except OSError as error:
        why = "the gateway was never converged"
        raise LabError("LAB-KEY", f"{key_file} cannot be read", why, "run `gpuyard lab up`") from error
    asked: Mapping[str, Any] = {
        "model": fleet.models[0].name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{fleet.gateway.port}/v1/chat/completions",
        data=json.dumps(asked).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
            return json.load(reply)["choices"][0]["message"]["content"].strip()
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace").strip()
        raise LabError("LAB-ASK", f"the gateway answers {error.code}", said, "run `gpuyard lab status`") from error
    except OSError as error:
        port = fleet.gateway.port
        raise LabError("LAB-ASK", f"no answer at 127.0.0.1:{port}", str(error), "run `gpuyard lab up`") from error
