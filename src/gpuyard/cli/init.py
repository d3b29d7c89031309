"""`gpuyard init`: the files of a new fleet, begun from one that is there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from gpuyard.cli.lab import project_of
from gpuyard.cli.plan import AsJson
from gpuyard.cli.refusals import refusals_told
from gpuyard.cli.write import answer, write
from gpuyard.handover.hosts import hosts_path, load_hosts
from gpuyard.spec.begin import examples, renamed
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import SpecError, load_fleet

STARTS = {"lab": "lab", "aws": "aws-g6e", "hosts": "onprem"}
"""The fleet of the repository that one of this provider is begun from."""


def register(app: typer.Typer) -> None:
    app.command()(init)


def init(
    name: Annotated[str, typer.Argument(help="Name of the new fleet; also of its stack and its inventory.")],
    provider: Annotated[
        Literal["lab", "aws", "hosts"] | None,
        typer.Option("--provider", help="Who provides the machines. Without it, who does in the fleet of --from."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="FLEET", help="A fleet of this project, or a spec's path, to begin from."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what would be written, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Begin a fleet: its spec, its inventory, and the file that names the hosts where you own them."""
    with refusals_told(as_json):
        project = project_of()
        start = start_of(project, source or STARTS[provider or "lab"])
        old = load_fleet(start)
        if provider and old.provider != provider:
            why = f"--provider says {provider}, and its machines come from {old.provider}"
            raise RefusedError(
                "INIT-PROVIDER", str(start), why, f"leave one of the two out, or begin from {STARTS[provider]}"
            )
        spec, inventory = project / f"fleets/{name}.yaml", project / f"inventories/{name}"
        texts = {spec: renamed(start.read_text(), old.name, name)}
        if old.provider == "hosts":
            texts[hosts_path(spec)] = renamed(hosts_path(start).read_text(), old.name, name)
        held_to_the_model(texts, spec)
        for path in (*texts, inventory):
            if path.exists():
                change = "name another fleet, or remove what is there"
                raise RefusedError("INIT-EXISTS", str(path.relative_to(project)), "it is there already", change)
        if not check:
            for path, text in texts.items():
                write(path, text)
            begin_inventory(project, old.name, STARTS[old.provider], inventory, name)
        told: dict[str, Any] = {
            "fleet": name,
            "provider": old.provider,
            "from": str(start),
            "written": not check,
            "files": [str(path.relative_to(project)) for path in (*texts, inventory)],
            "examples": [
                {"file": str(path.relative_to(project)), "line": line, "text": words}
                for path, text in texts.items()
                for line, words in examples(text)
            ],
            "next": next_steps(name, old.provider),
        }
        answer(as_json, told, "\n".join(lines_of(told)))


def start_of(project: Path, source: str) -> Path:
    """The spec to begin from. Raises RefusedError INIT-FROM."""
    for path in (project / f"fleets/{source}.yaml", Path(source)):
        if path.is_file():
            return path
    there = sorted(path.stem for path in (project / "fleets").glob("*.yaml") if "." not in path.stem)
    change = f"name a spec's path, or one of {', '.join(there)}"
    raise RefusedError("INIT-FROM", f"--from {source}", "there is no such fleet", change)


def held_to_the_model(texts: dict[Path, str], spec: Path) -> None:
    """The new files read as every command reads them, before one of them is written. Raises SpecError."""
    with TemporaryDirectory() as folder:
        there = {Path(folder) / path.name: path for path in texts}
        for path, meant in there.items():
            path.write_text(texts[meant])
        try:
            fleet = load_fleet(Path(folder) / spec.name)
            if hosts_path(spec) in texts:
                load_hosts(hosts_path(Path(folder) / spec.name), fleet)
        except SpecError as refused:
            raise SpecError(
                tuple(replace(finding, file=str(there[Path(finding.file)])) for finding in refused.findings)
            ) from refused


def begin_inventory(project: Path, old: str, start: str, inventory: Path, name: str) -> None:
    """The inventory of the fleet it is begun from; of its provider's first one, where that fleet has none."""
    source = next(path for path in (project / f"inventories/{old}", project / f"inventories/{start}") if path.is_dir())
    shutil.copytree(source, inventory, symlinks=True)
    if source.name == "lab":
        # The lab's fleets share what theirs says.
        shutil.rmtree(inventory / "group_vars")
        (inventory / "group_vars").symlink_to("../lab/group_vars")
    file = inventory / "fleet.pulumi.yml"
    write(file, renamed(file.read_text(), source.name, name))


def next_steps(name: str, provider: str) -> list[str]:
    steps = [f"gpuyard check fleets/{name}.yaml", f"gpuyard lock fleets/{name}.yaml"]
    play = f"ansible-playbook -i inventories/{name} playbooks/site.yml"
    match provider:
        case "lab":
            return [*steps, f"gpuyard lab up --stack {name}"]
        case "hosts":
            return [*steps, f"gpuyard hosts fleets/{name}.yaml", play]
        case _:
            return [*steps, f"pulumi stack select --create {name}", f"pulumi up --stack {name}", play]


def lines_of(told: dict[str, Any]) -> list[str]:
    lines = [f"{'written' if told['written'] else 'would be written'}: {', '.join(told['files'])}"]
    if found := told["examples"]:
        lines += ["put your own in the place of these:"]
        lines += [f"  {row['file']}:{row['line']}: {row['text'][:90]}" for row in found]
    return [*lines, "then:", *(f"  {step}" for step in told["next"])]
