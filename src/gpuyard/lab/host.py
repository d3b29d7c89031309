"""What the lab asks of the machine it runs on: commands, processes, control groups, and the refusals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuyard.lab.errors import LabError
from gpuyard.lab.place import Place, read_json

NODE_DISK_GIB = 2
PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "nft": "nftables",
    "ip": "iproute2",
    "ss": "iproute2",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "gpg": "gnupg",
    "apt-ftparchive": "apt-utils",
    "dpkg-deb": "dpkg",
}


def run(
    *command: str | Path,
    stdin: str | None = None,
    check: bool = True,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; a failure carries what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, check=False, timeout=300, cwd=cwd, env=env
    )
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LabError("LAB-COMMAND", f"`{' '.join(words)}` ended with {done.returncode}", said)
    return done


def wait_until(true: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def refuse_what_cannot_work(place: Place) -> None:
    """Every reason for which this machine cannot hold the lab, before anything is changed."""
    if missing := sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)}):
        names = " ".join(missing)
        raise LabError(
            "LAB-TOOLS", f"not installed: {names}", "nodes are made with them", f"apt-get install -y {names}"
        )
    _cgroup_root()
    if not (place.base_root / "usr").is_dir():
        raise LabError("LAB-ROOTFS", f"{place.base_root} is missing", "nodes are layers on it", "run `make setup`")
    place.state.mkdir(parents=True, exist_ok=True)
    kind = run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", place.state).stdout.strip()
    if kind == "overlay":
        raise LabError(
            "LAB-FS",
            f"{place.state} lies on overlayfs",
            "it cannot carry the overlays that are the nodes' disks",
            "put the project on a disk, or mount a volume at its folder .gpuyard",
        )


def refuse_a_full_disk(place: Place) -> None:
    free = shutil.disk_usage(place.state).free
    if free < NODE_DISK_GIB << 30:
        raise LabError(
            "LAB-DISK",
            f"{place.state} has {free / (1 << 30):.1f} GiB free",
            f"a node may need {NODE_DISK_GIB} GiB",
            "free some space",
        )


def has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


# --- processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: int
    boot: str

    @classmethod
    def recorded(cls, path: Path) -> Process | None:
        found = read_json(path)
        return None if found is None else cls(**found)

    @property
    def alive(self) -> bool:
        if self.boot != boot_id():
            return False
        stat = proc_stat(self.pid)
        return stat is not None and stat[1] == self.started and stat[0] not in "ZX"


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def proc_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process."""
    try:
        # The name in brackets may hold anything, blanks and brackets too: read behind the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


PATIENCE_SECONDS = 60
"""For what takes a moment: a process to begin or to end. Long, since a machine that does much else lets it wait."""

# Writes who it is before it becomes the program, so that a starter killed at any moment leaves no unknown process.
_BECOME = """
set -eu
record=$1 log=$2 cgroup=$3; shift 3
exec </dev/null >>"$log" 2>&1
[ -z "$cgroup" ] || echo $$ >"$cgroup/cgroup.procs"
printf '{"pid": %s, "started": %s, "boot": "%s"}\\n' "$$" "$(cut -d' ' -f22 /proc/$$/stat)" \
  "$(cat /proc/sys/kernel/random/boot_id)" >"$record.new"
mv "$record.new" "$record"
exec "$@"
"""


def start(place: Place, name: str, record: Path, log: Path, command: Sequence[str | Path]) -> Process:
    """Start a program that outlives us, in a session and a control group of its own.

    Where systemd is PID 1 the group is a delegated scope (written for, unproven: no test has run on such a host).
    """
    record.unlink(missing_ok=True)
    words = ["sh", "-c", _BECOME, "gpuyard-lab", record, log]
    if has_systemd():
        unit = f"--unit={cgroup_of(place, name).name}"
        scope = ["systemd-run", "--scope", "--quiet", "--collect", unit, "--property=Delegate=yes"]
        words = [*scope, *words, ""]
    else:
        group = cgroup_of(place, name)
        group.mkdir(parents=True, exist_ok=True)
        words = [*words, group]
    run("setsid", "--fork", *words, *command)
    if not wait_until(record.exists, PATIENCE_SECONDS):
        raise LabError("LAB-START", f"{name} did not start", change=f"see {log}")
    process = Process.recorded(record)
    if process is None:
        raise LabError("LAB-START", f"{name} was stopped while it started")
    return process


def end(place: Place, name: str, record: Path) -> None:
    """Stop a program and everything it started, at once: what is stopped here is also thrown away or begun anew."""
    process = Process.recorded(record)
    empty_cgroup(cgroup_of(place, name))
    if process and process.alive:
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not process.alive, PATIENCE_SECONDS)
    record.unlink(missing_ok=True)


# --- control groups: everything of a lab is in one, so nothing of it can be overlooked -------------------


def cgroup2() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(where)
    return None


def _cgroup_root() -> Path:
    root = cgroup2()
    if root is None:
        raise LabError(
            "LAB-CGROUP", "no cgroup2 is mounted", "systemd needs it", "mount -t cgroup2 none /sys/fs/cgroup"
        )
    return root


def cgroup_of(place: Place, name: str) -> Path:
    if has_systemd():
        return _cgroup_root() / "system.slice" / f"gpuyard-{place.id}-{name}.scope"
    return _cgroup_root() / "gpuyard" / place.id / name


def empty_all_cgroups(place: Place) -> None:
    """End whatever of a lab still runs, known to its state or not."""
    if has_systemd():
        for scope in (_cgroup_root() / "system.slice").glob(f"gpuyard-{place.id}-*.scope"):
            empty_cgroup(scope)
        return
    empty_cgroup(_cgroup_root() / "gpuyard" / place.id)
    drop_empty_cgroups(place)


def end_orphans(place: Place) -> None:
    """Of a lab whose folder was deleted under it, nodes may still run: they have no disk any more."""
    if not (place.state / "lab.json").exists() and not place.vms.exists():
        empty_all_cgroups(place)


def drop_empty_cgroups(place: Place) -> None:
    """Remove the groups that hold groups; those in which something is stay."""
    for group in (_cgroup_root() / "gpuyard" / place.id, _cgroup_root() / "gpuyard"):
        _removed(group)


def populated(group: Path) -> bool:
    try:
        return "populated 1" in (group / "cgroup.events").read_text()
    except (FileNotFoundError, OSError):
        return False


def empty_cgroup(group: Path) -> None:
    """Kill all that runs in a group and in the groups below it, and remove them."""
    if not group.is_dir():
        return
    (group / "cgroup.kill").write_text("1")
    if not wait_until(lambda: not populated(group), PATIENCE_SECONDS):
        raise LabError("LAB-KILL", f"processes in {group} survive SIGKILL", change=f"see {group}/cgroup.procs")
    for folder, _, _ in os.walk(group, topdown=False):
        wait_until(lambda folder=folder: _removed(Path(folder)), 5)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


# --- who owns the files ----------------------------------------------------------------------------------


def owner() -> tuple[int, int]:
    """The user on whose behalf we are root: files they must read are given to them."""
    return int(os.environ.get("SUDO_UID", os.getuid())), int(os.environ.get("SUDO_GID", os.getgid()))


def make_folder(path: Path) -> None:
    """A folder in the user's cache that the user can go on using, and remove."""
    if not path.is_dir():
        path.mkdir(parents=True)
        give_to_owner(path)


def give_to_owner(*paths: Path) -> None:
    uid, gid = owner()
    for path in paths:
        os.chown(path, uid, gid, follow_symlinks=False)
