"""A project of its own with the repository's program, the real engine and SDK, and an emulated account."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuyard.provision import name_in
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet
from tests.emulated_aws.account import Account
from tests.engine import REPOSITORY, Stack, new_project

FLEETS = sorted(path.stem for path in (REPOSITORY / "fleets").glob("aws-*.yaml") if not path.stem.endswith(".lock"))
KEY = "-----BEGIN PGP PUBLIC KEY BLOCK-----\nmDM\n-----END PGP PUBLIC KEY BLOCK-----\n"


@dataclass(kw_only=True)
class EmulatedFleet(Stack):
    """One fleet's stack, and the account that it is made in."""

    name: str
    endpoint: str

    def __post_init__(self) -> None:
        self.account = Account(self.endpoint, self.project / "account")

    def up(self) -> list[tuple[str, str]]:
        """Bring it up; what was made, changed and deleted in the account meanwhile."""
        self.forget()
        self.done("up", "--yes", "--skip-preview")
        return self.acts()

    def forget(self) -> None:
        (self.project / "account/journal.jsonl").unlink(missing_ok=True)

    def acts(self) -> list[tuple[str, str]]:
        path = self.project / "account/journal.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return sorted((line["act"], line["name"]) for line in lines if line["act"] != "created")

    def faults(self, *faults: dict[str, Any]) -> None:
        (self.project / "account/faults.json").write_text(json.dumps(faults))

    def spec(self) -> Fleet:
        return load_fleet(self.project / f"fleets/{self.name}.yaml")

    def edit(self, old: str, new: str) -> None:
        """Another spec, locked as a user would lock it."""
        spec = self.project / f"fleets/{self.name}.yaml"
        text = spec.read_text()
        assert old in text, old
        spec.write_text(text.replace(old, new, 1))
        subprocess.run(["gpuyard", "lock", str(spec)], check=True, capture_output=True)

    def resize(self, pool: str, nodes: int) -> None:
        """Another number of nodes of a pool."""
        text = (self.project / f"fleets/{self.name}.yaml").read_text()
        found = re.search(rf"  - name: {pool}\n    nodes: \d+\n", text)
        assert found, pool
        self.edit(found[0], f"  - name: {pool}\n    nodes: {nodes}\n")

    def give_up(self, *names: str) -> None:
        """Consent to the loss of these; without names, of the whole fleet."""
        urns = [row["urn"] for row in self.state() if name_in(row["urn"]) in names]
        assert len(urns) == len(names), names
        self.done("state", "unprotect", "--yes", *(urns or ["--all"]))

    def state(self) -> list[dict[str, Any]]:
        """Resources in the state that are of AWS."""
        return [row for row in self.exported().get("resources", []) if row["type"].startswith("aws:")]

    def instances(self) -> dict[str, dict[str, Any]]:
        """Machines that run in the account, by name."""
        pages = self.account.client("ec2").get_paginator("describe_instances").paginate()
        found = [one for page in pages for some in page["Reservations"] for one in some["Instances"]]
        alive = [one for one in found if one["State"]["Name"] == "running"]
        names = [next(tag["Value"] for tag in one["Tags"] if tag["Key"] == "Name") for one in alive]
        assert len(set(names)) == len(names), f"a machine is there twice: {sorted(names)}"
        return dict(zip(names, alive, strict=True))

    def left(self) -> list[str]:
        """What of the fleet is still in the account."""
        ec2, mine = self.account.client("ec2"), [{"Name": "tag:gpuyard:fleet", "Values": [self.name]}]
        found = {f"machine {name}" for name in self.instances()}
        for what, call, key in (
            ("VPC", "vpcs", "VpcId"),
            ("subnet", "subnets", "SubnetId"),
            ("group", "security_groups", "GroupId"),
            ("way out", "internet_gateways", "InternetGatewayId"),
            ("routes", "route_tables", "RouteTableId"),
            ("endpoint", "vpc_endpoints", "VpcEndpointId"),
            ("address", "addresses", "AllocationId"),
            ("template", "launch_templates", "LaunchTemplateId"),
            ("key", "key_pairs", "KeyName"),
        ):
            answer = getattr(ec2, f"describe_{call}")(Filters=mine)
            listed = next(value for value in answer.values() if isinstance(value, list))
            found |= {f"{what} {each[key]}" for each in listed if each.get("State") != "deleted"}
        gateways = ec2.describe_nat_gateways(Filter=mine)["NatGateways"]
        found |= {f"NAT {each['NatGatewayId']}" for each in gateways if each["State"] != "deleted"}
        found |= {f"bucket {each['Name']}" for each in self.account.client("s3").list_buckets()["Buckets"]}
        found |= {f"role {each['RoleName']}" for each in self.account.client("iam").list_roles()["Roles"]}
        found |= {f"placement group {name}" for name in self.account.beside("placement")}
        balancers = self.account.client("elbv2").describe_load_balancers()["LoadBalancers"]
        found |= {f"balancer {each['LoadBalancerName']}" for each in balancers}
        files = self.account.client("fsx").describe_file_systems()["FileSystems"]
        files += self.account.client("efs").describe_file_systems()["FileSystems"]
        return sorted(found | {f"files {each['FileSystemId']}" for each in files})

    def template(self, name: str) -> dict[str, Any]:
        """The launch template of this name, as the account keeps it."""
        found = self.account.client("ec2").describe_launch_template_versions(
            LaunchTemplateName=name, Versions=["$Latest"]
        )
        return found["LaunchTemplateVersions"][0]["LaunchTemplateData"]


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """moto's server on a free port; the address that it listens on."""
    folder.mkdir(parents=True, exist_ok=True)
    # One request at a time: moto reads and changes its dictionaries from every thread and fails on it now and then.
    program = (
        "import sys\n"
        "from threading import Lock, Thread\n"
        "from moto.moto_server import werkzeug_app as moto\n"
        "from werkzeug.serving import make_server\n"
        "app, lock = moto.DomainDispatcherApplication(moto.create_backend_app), Lock()\n"
        "def alone(environ, start):\n"
        "    with lock:\n"
        "        return list(app(environ, start))\n"
        "server = make_server('127.0.0.1', 0, alone, threaded=True, request_handler=moto.MotoRequestHandler)\n"
        "Thread(target=server.serve_forever, daemon=True).start()\n"
        "print(f'{server.host}:{server.port}', flush=True)\n"
        "sys.stdin.read()\n"
    )
    log = (folder / "moto.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
    )
    try:
        assert server.stdout is not None
        yield f"http://{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.wait()
        log.close()


def reset(endpoint: str) -> None:
    """An empty account."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=30).close()


def emulated_fleet(folder: Path, name: str, endpoint: str) -> EmulatedFleet:
    """A project with an empty stack of one of the repository's fleets."""
    project = folder / name
    environment = new_project(project, folder / "pulumi-home")
    for part in ("keys", "account", "bin"):
        (project / part).mkdir()
    for part in ("stacks", "requirements"):
        ignored = shutil.ignore_patterns("__pycache__", "config")
        shutil.copytree(REPOSITORY / part, project / part, ignore=ignored, dirs_exist_ok=True)
    for suffix in ("yaml", "lock.yaml"):
        shutil.copy(REPOSITORY / f"fleets/{name}.{suffix}", project / "fleets")
    (project / "keys/nvidia.asc").write_text(KEY)
    plugin = project / "bin/pulumi-resource-aws"
    plugin.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.emulated_aws.provider "$@"\n')
    plugin.chmod(0o755)
    environment |= {
        "PATH": f"{plugin.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{project}:{REPOSITORY}",
        "PULUMI_PYTHON_CMD": sys.executable,
        "AWS_ENDPOINT_URL": endpoint,
        "GPUYARD_EMULATED_AWS": str(project / "account"),
    }
    made = EmulatedFleet(project, environment, name=name, endpoint=endpoint)
    aws = made.spec().aws
    assert aws is not None
    made.account.keep_beside("images", aws.image.id, {"rootDeviceName": aws.image.root_device})
    made.done("stack", "select", "--create", name)
    return made
