"""What a host says of itself over SSH, before anything is done to it, and what is to be thought of that. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from gpuyard.handover import Handover, Node
from gpuyard.spec.fleet import Fleet

# A node's own Python may be missing, and that is one of the things to tell: nothing but a shell is asked for.
QUESTION = r"""
. /etc/os-release; echo "distribution=$ID-$VERSION_ID"
echo "machine=$(cat /etc/machine-id)"; echo "architecture=$(uname -m)"
echo "python=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
[ "$(id -u)" = 0 ] && echo root=yes || { sudo -n true 2>/dev/null && echo root=yes || echo root=no; }
gpus=0; for d in /sys/bus/pci/devices/*; do
  case "$(cat $d/vendor $d/class 2>/dev/null | tr -d '\n')" in 0x10de0x0302*|0x10de0x0300*) gpus=$((gpus+1));; esac
done; echo "gpus=$gpus"
"""
OLDEST_PYTHON = (3, 9)


@dataclass(frozen=True, slots=True)
class Answer:
    """How the question ended: exit code of ssh, what the host said, what ssh said."""

    rc: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.out.splitlines() if "=" in line)


@dataclass(frozen=True, slots=True)
class HostFinding:
    """One thing that keeps a host from being converged."""

    rule: str
    node: str
    found: str
    why: str
    change: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}: {self.found}: {self.why}; {self.change}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def judge(handover: Handover, fleet: Fleet, answers: Mapping[str, Answer]) -> list[HostFinding]:
    """Every finding, in the order of the nodes."""
    found: list[HostFinding] = []
    machines: dict[str, str] = {}
    for node in handover.nodes:
        answer = answers[node.name]
        if answer.rc:
            found.append(_not_reached(node, handover, answer))
            continue
        found += _unfit(node, fleet, answer.facts)
        machine = answer.facts.get("machine", "")
        if machine and machine in machines:
            why = f"it has the machine id {machine}, and so has {machines[machine]}"
            change = "take one of the two out; of cloned machines, give one a new id: `systemd-machine-id-setup`"
            found.append(HostFinding("HOSTS-SAME-MACHINE", node.name, node.address, why, change))
        machines.setdefault(machine, node.name)
    return found


def _not_reached(node: Node, handover: Handover, answer: Answer) -> HostFinding:
    said = answer.err.strip().splitlines()
    last = said[-1] if said else f"ssh ended with {answer.rc} and said nothing"
    where = f"{node.address} port {node.port}"
    ssh = handover.ssh
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in answer.err:
        change = f"find out why; if it was installed anew: `ssh-keygen -R {_known_as(node)} -f {ssh.known_hosts_file}`"
        return HostFinding("HOSTS-KEY-CHANGED", node.name, where, "its host key is not the one that is known", change)
    if "Host key verification failed" in answer.err:
        change = f"compare its key at its console, then `ssh-keyscan -p {node.port} {node.address}` has the line"
        why = f"{ssh.known_hosts_file} has no key of it, and a stranger could answer in its place"
        return HostFinding("HOSTS-KEY", node.name, where, why, change)
    if "Permission denied" in answer.err:
        change = f"give it the public half of {ssh.private_key_file}: `ssh-copy-id`"
        return HostFinding("HOSTS-LOGIN", node.name, where, f"it does not let {ssh.user} in", change)
    if "ssh:" in answer.err or answer.rc in (124, 255):
        change = f"see that it has power and that its SSH listens there: `nc -vz {node.address} {node.port}`"
        return HostFinding("HOSTS-UNREACHABLE", node.name, where, last, change)
    return HostFinding("HOSTS-SHELL", node.name, where, last, f"give {ssh.user} a plain shell there")


def _known_as(node: Node) -> str:
    return node.address if node.port == 22 else f"[{node.address}]:{node.port}"


def _unfit(node: Node, fleet: Fleet, facts: Mapping[str, str]) -> list[HostFinding]:
    found: list[HostFinding] = []

    def tell(rule: str, what: str, why: str, change: str) -> None:
        found.append(HostFinding(rule, node.name, what, why, change))

    distribution = facts.get("distribution", "")
    if distribution != fleet.distribution:
        why = f"the lock's packages are for {fleet.distribution}"
        tell("HOSTS-DISTRIBUTION", distribution or "no /etc/os-release", why, f"install {fleet.distribution} on it")
    if facts.get("architecture") != "x86_64":
        tell(
            "HOSTS-ARCHITECTURE", facts.get("architecture", "none told"), "packages are for x86_64", "take another host"
        )
    python = tuple(int(part) for part in re.findall(r"\d+", facts.get("python", "")))
    if python < OLDEST_PYTHON:
        least = ".".join(map(str, OLDEST_PYTHON))
        why = f"what runs on a node needs /usr/bin/python3 of {least} or later"
        tell("HOSTS-PYTHON", f"Python {facts.get('python') or 'none'}", why, "`apt-get install python3`")
    if facts.get("root") != "yes":
        tell(
            "HOSTS-ROOT",
            "no way to become root",
            "packages and units are root's affair",
            "allow `sudo` without a password",
        )
    gpus = facts.get("gpus", "0")
    # A simulated GPU is plugged in by the converge itself.
    if node.role == "gpu" and not node.simulated and gpus != str(node.gpu_count):
        why = f"the spec says {node.gpu_count} of pool {node.pool}"
        change = f"look at `lspci -d 10de:` there, or set gpus_per_node of pool {node.pool} to what it has"
        tell("HOSTS-GPUS", f"{gpus} NVIDIA GPUs on its PCI bus", why, change)
    return found
