"""Where a lab keeps what: its folder, its locks, its addresses, and the machine-wide list of labs."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import tempfile
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpuyard.lab.errors import LabError
from gpuyard.lab.models import LabRef

REGISTRY = Path("/run/gpuyard")
FORMAT = 2
"""What a lab of this gpuyard is made of. A lab of another format is served as it is, and broken by its own gpuyard."""
GATEWAY_OCTETS = range(10, 20)
GPU_OCTETS = range(20, 251)
SUBNETS = tuple(ipaddress.IPv4Network(f"10.77.{n}.0/24") for n in range(256))


def default_cache() -> Path:
    if chosen := os.environ.get("GPUYARD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuyard"


@dataclass(frozen=True, slots=True)
class Place:
    """A lab on this machine, as paths and names."""

    lab: LabRef
    cache: Path

    @property
    def id(self) -> str:
        return self.lab.id

    @property
    def bridge(self) -> str:
        return f"gy-{self.id}"

    @property
    def table(self) -> str:
        return f"gpuyard_{self.id}"

    @property
    def state(self) -> Path:
        return self.lab.project.resolve() / ".gpuyard" / "labs" / self.lab.stack

    @property
    def ssh(self) -> Path:
        return self.state / "ssh"

    @property
    def nodes(self) -> Path:
        return self.state / "nodes"

    @property
    def vms(self) -> Path:
        return self.state / "vms"

    @property
    def apt(self) -> Path:
        return self.state / "apt"

    @property
    def models(self) -> Path:
        """Where the model files are that nodes fetch: this machine's, or those that the project brings itself."""
        own = self.lab.project.resolve() / ".gpuyard" / "models"
        return own if own.is_dir() else self.cache / "models"

    @property
    def views(self) -> Path:
        """How the repository looks to single nodes, by address; a node without one sees it as it is."""
        return self.state / "views"

    @property
    def base_root(self) -> Path:
        return self.cache / "lab" / "root"

    def node(self, name: str) -> Path:
        return self.nodes / name

    def vm(self, name: str) -> Path:
        return self.vms / name

    def machine(self, address: str) -> str:
        """The nspawn machine name: short, so that its host-side interface `vb-<machine>` is not shortened to a hash."""
        return f"{self.id}-{address.rsplit('.', 1)[1]}"

    @contextlib.contextmanager
    def lock(self, node: str | None = None) -> Generator[None]:
        """Hold the lab, or one node of it, against every other process."""
        beside = self.state.parent
        beside.mkdir(parents=True, exist_ok=True)
        with flock(beside / f".{self.lab.stack}{f'.{node}' if node else ''}.lock"):
            yield

    def drop_lock(self, node: str | None = None) -> None:
        (self.state.parent / f".{self.lab.stack}{f'.{node}' if node else ''}.lock").unlink(missing_ok=True)


@contextlib.contextmanager
def flock(path: Path) -> Generator[None]:
    """An exclusive lock on a file that may be deleted by its holder: whoever waited on the deleted one asks again."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    yield
                    return
        finally:
            os.close(handle)


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """All of it or nothing, whoever is killed in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LabError(
            "LAB-STATE", f"{path} is damaged", str(error), "remove this lab with `gpuyard lab down`"
        ) from error


def free_address(subnet: str, taken: Mapping[str, str], name: str, role: Literal["gateway", "gpu"]) -> str:
    """The address of a node: the one it has, else the first free one of its role."""
    if name in taken:
        return taken[name]
    network = ipaddress.IPv4Network(subnet)
    octets = GATEWAY_OCTETS if role == "gateway" else GPU_OCTETS
    used = set(taken.values())
    for octet in octets:
        if (address := str(network.network_address + octet)) not in used:
            return address
    raise LabError(
        "LAB-FULL", f"no address is left for {name}", f"a lab holds {len(octets)} {role} nodes", "ask for fewer"
    )


def free_subnet(taken: Iterable[str], routed: Iterable[ipaddress.IPv4Network]) -> str:
    """The first of 10.77.0.0/24 … 10.77.255.0/24 that no lab has and this machine does not route elsewhere."""
    used, routes = set(taken), list(routed)
    for subnet in SUBNETS:
        if str(subnet) not in used and not any(subnet.overlaps(route) for route in routes):
            return str(subnet)
    raise LabError(
        "LAB-SUBNET", "no 10.77.N.0/24 is free on this machine", change="remove a lab with `gpuyard lab down`"
    )


@contextlib.contextmanager
def registry() -> Generator[dict[str, Any]]:
    """The labs of this machine, by id; what the block leaves in it is written back."""
    REGISTRY.mkdir(mode=0o755, exist_ok=True)
    with flock(REGISTRY / "lock"):
        path = REGISTRY / "labs.json"
        found = read_json(path) or {}
        before = json.dumps(found, sort_keys=True)
        yield found
        if not found:
            path.unlink(missing_ok=True)
        elif json.dumps(found, sort_keys=True) != before:
            write_json(path, found)
