"""What a fault is: values chosen by a user, steps that break and mend, a question to which a broken node says yes.

Everything here is pure. A step on a node is two pieces of shell text, one to break and one to mend; a step on this
machine is a value that says how things are while the fault lasts. `rim` carries both out.
"""

from __future__ import annotations

import difflib
import random
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gpuyard.lab.errors import LabError
from gpuyard.lab.models import NodeSpec

CONTROLLER = "controller"
"""The name to break where nothing on a node breaks, but this machine, from which the fleet is run."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value that a user may choose, as `name=value`."""

    name: str
    meaning: str
    default: str
    among: tuple[str, ...] = ()
    between: tuple[float, float] | None = None
    like: str = ""
    """What it has to match: a name is a name, so that it is one also in the middle of shell text."""

    def checked(self, value: str) -> str:
        if self.among and value not in self.among:
            raise UsageError(f"{self.name} is {value!r}", f"it is one of {', '.join(self.among)}")
        if self.between:
            least, most = self.between
            try:
                good = least <= float(value) <= most and (isinstance(least, float) or float(value).is_integer())
            except ValueError:
                good = False
            if not good:
                kind = "a number" if isinstance(least, float) else "a whole number"
                raise UsageError(f"{self.name} is {value!r}", f"it is {kind} from {least} to {most}")
        if self.like and not re.fullmatch(self.like, value):
            raise UsageError(f"{self.name} is {value!r}", f"it is like {self.default or self.like}")
        if not value.isprintable():
            raise UsageError(f"{self.name} is {value!r}", "it is one printable line")
        return value


PACKAGE = r"[a-z0-9][a-z0-9+.-]+"


class UsageError(LabError):
    """Words that name nothing: the command ends as one that was called wrongly."""

    def __init__(self, found: str, change: str) -> None:
        super().__init__("FAULT-USAGE", found, change=change)


# --- steps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OnNode:
    """Shell text run on the node as root. `$keep` is a folder of the fault's own, which mending removes at its end."""

    do: str
    undo: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """Frames that the bridge drops."""

    direction: str
    """both; in: nothing reaches the node; out: nothing of it reaches others."""
    peer: str
    """all, host, or the name of one node."""


@dataclass(frozen=True, slots=True)
class Rate:
    """The cable to the node carries no more than this."""

    kbit: int


@dataclass(frozen=True, slots=True)
class Flaps:
    """The cable loses its carrier so many times, once."""

    times: int
    down_seconds: float


@dataclass(frozen=True, slots=True)
class Dark:
    """The node has no power."""


@dataclass(frozen=True, slots=True)
class Repository:
    """How the package repository looks to this node alone."""

    without: str = ""
    """Shell pattern of the files that are not there."""
    postinst: tuple[str, str] | None = None
    """Shell pattern of packages, and the shell text that their configuration ends with."""
    truncated: str = ""
    """Shell pattern of packages that end in the middle, though the index knows them whole."""
    stale_index: bool = False
    """The index is another than the signed one."""
    strange_key: bool = False
    """Signed with a key that no node trusts."""
    second: bool = False
    """There is a second repository, at `…/nvidia-second`, whose packages are newer and cannot be installed."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Killed:
    """Programs of this project that are killed, once."""

    program: str


@dataclass(frozen=True, slots=True)
class Truncated:
    """A file of this project that ends in the middle."""

    file: str
    seed: int


Step = OnNode | Cut | Rate | Flaps | Dark | Repository | Killed | Truncated


@dataclass(frozen=True, slots=True)
class Probe:
    """A shell question that ends with 0 while the fault lasts, and otherwise before and after. `$keep` as in steps."""

    ask: str
    where: str = "node"
    """node; or host: this machine, with `$address` of the node, `$login` to it and `$project`."""


# --- faults ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault of one node, with all that was chosen; the same values make the same fault."""

    fault: str
    node: str
    gpu: int = 0
    seed: int = 0
    values: Mapping[str, str] = field(default_factory=dict[str, str])

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def number(self, name: str) -> float:
        return float(self.values[name])

    def whole(self, name: str) -> int:
        return int(float(self.values[name]))

    def quoted(self, name: str) -> str:
        return shlex.quote(self.values[name])

    @property
    def dice(self) -> random.Random:
        return random.Random(f"{self.seed}/{self.fault}/{self.node}")  # noqa: S311 - to be had again, not secret

    @property
    def bdf(self) -> str:
        """Where the lab's hardware has this GPU on the bus; role lab_gpu lays it out."""
        return f"0000:{25 + 16 * self.gpu:02x}:00.0"


@dataclass(frozen=True, slots=True)
class Fault:
    id: str
    imitates: str
    source: str
    rows: tuple[str, ...]
    """What of the list in docs/lab.md it serves."""
    steps: Callable[[Injection], tuple[Step, ...]]
    probe: Callable[[Injection], Probe]
    parameters: tuple[Parameter, ...] = ()
    needs: tuple[str, ...] = ()
    """Names of NEEDS: what has to be there to be broken."""
    of_gpu: bool = False
    """Breaks one GPU, so --gpu chooses which."""
    target: str = "node"

    def chosen(self, node: NodeSpec | None, gpu: int | None, seed: int, words: Mapping[str, str]) -> Injection:
        """The injection that these words ask for, or why there is none."""
        name = node.name if node else CONTROLLER
        if (node is None) != (self.target == CONTROLLER):
            broken = CONTROLLER if self.target == CONTROLLER else "a node"
            raise UsageError(f"{self.id} does not break {name}", f"it breaks {broken}: name that")
        if gpu is not None and not self.of_gpu:
            raise UsageError(f"{self.id} is not the fault of one GPU", "leave --gpu out")
        if self.of_gpu and node and not 0 <= (gpu or 0) < node.gpu_count:
            there = f"0 to {node.gpu_count - 1}" if node.gpu_count else "none: name a GPU node"
            raise UsageError(f"{name} has no GPU {gpu or 0}", f"it has {there}")
        known = {parameter.name: parameter for parameter in self.parameters}
        if unknown := [word for word in words if word not in known]:
            there = nearest(unknown[0], known) or "it has none"
            raise UsageError(f"{self.id} has no parameter {unknown[0]}", there)
        values = {name: known[name].checked(words.get(name, known[name].default)) for name in known}
        return Injection(self.id, name, gpu or 0, seed, values)


@dataclass(frozen=True, slots=True)
class Need:
    ask: str
    what: str


NEEDS: Mapping[str, Need] = {
    "gpus": Need("test -x /usr/local/lib/gpuyard-lab/simulated_gpu.py", "simulated GPUs (role lab_gpu)"),
    "driver": Need("test -e /proc/driver/nvidia/version", "a loaded driver"),
    "persistenced": Need("systemctl cat nvidia-persistenced.service >/dev/null 2>&1", "nvidia-persistenced"),
    "fabric manager": Need("systemctl is-active --quiet nvidia-fabricmanager", "a running fabric manager"),
    "repository": Need(
        "grep -rqs :8099/nvidia /etc/apt/sources.list.d && apt-cache madison libnvidia-ml1 | grep -q :8099/",
        "the lab's package repository, read by apt",
    ),
    "two versions": Need(
        "test $(apt-cache madison libnvidia-ml1 | awk '{print $3}' | sort -u | wc -l) -gt 1",
        "a repository with two versions of the driver",
    ),
    "engine": Need("systemctl list-units --plain --no-legend 'vllm@*' | grep -q .", "an engine"),
    "simulated engine": Need(
        # By its settings: an engine that is stopped has no unit that systemd would show.
        "grep -qs vllm-sim /etc/systemd/system/vllm@*.service /etc/systemd/system/vllm@*.service.d/*.conf",
        "an engine of the kind vllm-sim",
    ),
}


def nearest(word: str, known: Mapping[str, object] | list[str]) -> str:
    """What a user may have meant, or all there is."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else (f"there are {', '.join(known)}" if known else "")
