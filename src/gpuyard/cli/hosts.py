"""`gpuyard hosts`: are the hosts of a file those that the fleet asks for, and can they be converged?"""

from __future__ import annotations

import json
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.table import Table

from gpuyard.cli.lab import console
from gpuyard.cli.plan import AsJson, FleetFile
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.handover import Handover, Node, Ssh
from gpuyard.handover.hosts import hosts_path, load_hosts
from gpuyard.handover.inventory import ssh_args
from gpuyard.handover.reach import QUESTION, Answer, judge
from gpuyard.spec.loader import load_fleet

CONNECT_SECONDS = 10
ANSWER_SECONDS = 30


def register(app: typer.Typer) -> None:
    app.command()(hosts)


def hosts(
    fleet: FleetFile,
    offline: Annotated[bool, typer.Option("--offline", help="Look at the file alone, and ask no host.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold FLEET.hosts.yaml against the fleet's spec, then ask each host over SSH whether it can be converged.

    Nothing on a host is changed.
    """
    with refusals_told(as_json):
        spec = load_fleet(fleet)
        handover = load_hosts(hosts_path(fleet), spec)
        answers = {} if offline else asked(handover)
        findings = [] if offline else judge(handover, spec, answers)
        facts = {name: answer.facts for name, answer in answers.items()}
        if as_json:
            nodes = [{**node.model_dump(mode="json"), "said": facts.get(node.name)} for node in handover.nodes]
            told = {"fleet": handover.fleet, "nodes": nodes, "findings": [finding.as_dict() for finding in findings]}
            typer.echo(json.dumps(told, indent=2))
        else:
            tell(handover, facts)
            for finding in findings:
                typer.echo(str(finding))
        if findings:
            raise typer.Exit(FINDINGS)


def asked(handover: Handover) -> dict[str, Answer]:
    """What each host says; all are asked at once."""
    nodes = handover.nodes
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(ask, nodes, [handover.ssh] * len(nodes))
        return dict(zip((node.name for node in nodes), answers, strict=True))


def ask(node: Node, ssh: Ssh) -> Answer:
    words = ["ssh", "-T", "-i", ssh.private_key_file, "-p", str(node.port), *shlex.split(ssh_args(ssh, node))]
    words += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", f"{ssh.user}@{node.address}", "sh -s"]
    try:
        done = subprocess.run(
            words, input=QUESTION, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"no answer within {ANSWER_SECONDS} s")
    return Answer(done.returncode, done.stdout, done.stderr)


def tell(handover: Handover, facts: dict[str, dict[str, str]]) -> None:
    table = Table("host", "pool", "address", "distribution", "python", "NVIDIA GPUs")
    for node in handover.nodes:
        said = facts.get(node.name, {})
        cells = (said.get(key) or "-" for key in ("distribution", "python", "gpus"))
        table.add_row(node.name, node.pool or "gateway", f"{node.address}:{node.port}", *cells)
    console().print(table)
