"""Who exists: the handover of a Pulumi stack or a file of hosts, and the current lock, as an Ansible inventory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: pulumi
short_description: Nodes of a gpuyard fleet, from its Pulumi stack or its file of hosts, and its lock
description:
  - Reads the output C(handover) of a stack, which says which nodes exist and how to reach them, and merges the
    fleet's current lock, which says what they run. Nothing is written and nothing is cached.
  - For hosts you own a file written by hand takes the place of the stack, and no Pulumi is needed.
  - Refuses, with the cause in one line, whatever would leave a play without its hosts or with another fleet's software.
  - Every text it gives is a value. A text with braces in it is not evaluated as a template.
author:
  - gpuyard
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: Names this plugin.
    required: true
    choices: [gpuyard.fleet.pulumi]
  stack:
    description: The Pulumi stack of the fleet. Required unless O(source=hosts).
    type: str
  fleet:
    description:
      - The fleet, for O(source=hosts). C(fleets/<fleet>.yaml) is its spec, C(fleets/<fleet>.hosts.yaml) says which
        hosts it has.
    type: str
  project_dir:
    description:
      - The folder of C(Pulumi.yaml), relative to the inventory file.
      - Left out, it is the nearest folder with that file above the inventory.
    type: str
  lock:
    description:
      - The lock of the fleet, relative to O(project_dir).
      - Left out, it is C(fleets/<fleet>.lock.yaml) of the fleet that the handover names.
    type: str
  source:
    description: Whether to ask the C(pulumi) command, or to read the file that C(pulumi stack export) wrote, or the
      file of hosts.
    type: str
    choices: [cli, state_file, hosts]
    default: cli
  state_file:
    description: The exported state, relative to the inventory file. For O(source=state_file).
    type: str
  output:
    description: The output of the stack that holds the handover.
    type: str
    default: handover
"""

EXAMPLES = r"""
# inventories/lab/fleet.pulumi.yml
plugin: gpuyard.fleet.pulumi
stack: lab

---
# On a machine without the Pulumi command
plugin: gpuyard.fleet.pulumi
stack: prod
source: state_file
state_file: prod.state.json
keyed_groups:
  - key: nvidia_driver_branch
    prefix: driver

---
# Hosts you own
plugin: gpuyard.fleet.pulumi
source: hosts
fleet: onprem
"""

import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleParserError  # noqa: E402
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable  # noqa: E402

try:
    from gpuyard.handover import read_handover
    from gpuyard.handover.hosts import hosts_path, load_hosts
    from gpuyard.handover.inventory import build
    from gpuyard.plan.lock import check_lock, load_lock, lock_path
    from gpuyard.spec.errors import RefusedError
    from gpuyard.spec.loader import load_fleet
except ImportError as missing:
    MISSING: ImportError | None = missing
else:
    MISSING = None

PULUMI_SECONDS = 120


class InventoryModule(BaseInventoryPlugin, Constructable):
    NAME = "gpuyard.fleet.pulumi"

    def verify_file(self, path: str) -> bool:
        return super().verify_file(path) and path.endswith((".pulumi.yml", ".pulumi.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        if MISSING:
            found = f"this Ansible's Python cannot import gpuyard ({MISSING})"
            raise refusal("INV-PYTHON", found, "run the ansible of the project's environment: `. ./activate`")
        try:
            self._add(self._read(Path(path)))
        except RefusedError as refused:
            raise AnsibleParserError(str(refused)) from refused

    def _read(self, path: Path) -> Any:
        project = self._project(path)
        stack, output = self.get_option("stack"), self.get_option("output")
        if self.get_option("source") == "hosts":
            return self._of_hosts(project)
        if not stack:
            raise refusal("INV-STACK", "no stack is named", "name one; of hosts you own, set `source: hosts`")
        if self.get_option("source") == "cli":
            outputs = outputs_by_cli(project, stack)
        else:
            outputs = outputs_in_file(path.parent, self.get_option("state_file"))
        if output not in outputs:
            found = f"stack {stack} has no output {output}"
            raise refusal("INV-OUTPUT", found, f"bring it up first: `pulumi up --stack {stack}`")
        handover = read_handover(outputs[output])
        if handover.stack != stack:
            found = f"the handover is of stack {handover.stack}, not {stack}"
            raise refusal("INV-STACK", found, "name the stack that the state was exported from")
        return build(handover, load_lock(project / (self.get_option("lock") or f"fleets/{handover.fleet}.lock.yaml")))

    def _of_hosts(self, project: Path) -> Any:
        name = self.get_option("fleet")
        if not name:
            raise refusal("INV-HOSTS", "source is hosts and no fleet is named", "name one")
        spec = project / f"fleets/{name}.yaml"
        fleet, lock = load_fleet(spec), load_lock(project / (self.get_option("lock") or lock_path(spec)))
        check_lock(lock, fleet)  # with a stack `pulumi up` does this
        return build(load_hosts(hosts_path(spec), fleet), lock)

    def _project(self, path: Path) -> Path:
        if named := self.get_option("project_dir"):
            project = (path.parent / named).resolve()
            if not (project / "Pulumi.yaml").is_file():
                raise refusal("INV-PROJECT", f"no Pulumi.yaml in {project}", "correct project_dir")
            return project
        for folder in path.absolute().parents:
            if (folder / "Pulumi.yaml").is_file():
                return folder
        raise refusal("INV-PROJECT", f"no Pulumi.yaml in any folder above {path}", "set project_dir")

    def _add(self, found: Any) -> None:
        for group in found.groups:
            self.inventory.add_group(group)
        for host, variables in found.hostvars.items():
            self.inventory.add_host(host)
            for name, value in variables.items():
                self.inventory.set_variable(host, name, value)
        for group, hosts in found.groups.items():
            for host in hosts:
                self.inventory.add_child(group, host)
        strict = self.get_option("strict")
        for host in found.hostvars:
            variables = self.inventory.get_host(host).get_vars()
            self._set_composite_vars(self.get_option("compose"), variables, host, strict=strict)
            self._add_host_to_composed_groups(self.get_option("groups"), variables, host, strict=strict)
            self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, host, strict=strict)


def outputs_by_cli(project: Path, stack: str) -> dict[str, Any]:
    """All outputs of a stack: asked for all, the command fails only where the stack itself is missing."""
    pulumi = shutil.which("pulumi")
    if pulumi is None:
        change = "run `. ./activate` in the project, or read an exported state with `source: state_file`"
        raise refusal("INV-CLI", "there is no pulumi on PATH", change)
    asked = [pulumi, "stack", "output", "--json", "--non-interactive", "--stack", stack]
    try:
        done = subprocess.run(asked, cwd=project, capture_output=True, text=True, check=False, timeout=PULUMI_SECONDS)
    except subprocess.TimeoutExpired:
        found = f"pulumi did not answer for stack {stack} within {PULUMI_SECONDS} s"
        raise refusal("INV-CLI", found, "look at `pulumi stack output`") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), done.stderr.strip())
        found = f"pulumi cannot read stack {stack}: {' '.join(said.removeprefix('error: ').split())}"
        raise refusal("INV-STACK", found, f"`. ./activate` in the project, then `pulumi up --stack {stack}`")
    return json.loads(done.stdout)


def outputs_in_file(beside: Path, name: str | None) -> dict[str, Any]:
    """The outputs in a state that `pulumi stack export` wrote."""
    again = "write it with `pulumi stack export --file …`"
    if not name:
        raise refusal("INV-STATE", "source is state_file and no state_file is named", "name one")
    path = beside / name
    if not path.is_file():
        raise refusal("INV-STATE", f"no state file {path}", again)
    try:
        resources = json.loads(path.read_text())["deployment"].get("resources", [])
        stacks = [resource for resource in resources if resource["type"] == "pulumi:pulumi:Stack"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refusal("INV-STATE", f"{path} is not an exported state", again) from None
    return stacks[0].get("outputs", {}) if stacks else {}


def refusal(rule: str, found: str, change: str) -> AnsibleParserError:
    """What was found, and the smallest change that would pass."""
    return AnsibleParserError(f"{rule}: {found}; {change}")
