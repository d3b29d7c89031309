"""What faults are on this machine: rules of the bridge, limits of cables, each node's view of the repository.

All of it follows from the records: `settle` compares what should be with what is. Breaking and mending, again after a
kill, are the same call.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpuyard.lab import mirror
from gpuyard.lab.faults import record
from gpuyard.lab.faults.model import Cut, Flaps, Killed, Rate, Repository, Step, Truncated
from gpuyard.lab.faults.table import FAULTS
from gpuyard.lab.host import run
from gpuyard.lab.packages.recipes import Package
from gpuyard.lab.place import Place, read_json, write_atomically


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one node's faults ask of this machine."""

    cuts: tuple[Cut, ...] = ()
    rate: Rate | None = None
    repository: tuple[Repository, ...] = ()


def steps_of(entry: record.Entry) -> tuple[Step, ...]:
    return FAULTS[entry.injection.fault].steps(entry.injection)


def wanted(entries: Iterable[record.Entry]) -> Wanted:
    """Pure: what stands while these last. One that waits, or is being mended, does not."""
    steps = [step for entry in entries if entry.stage in (record.BREAKING, record.BROKEN) for step in steps_of(entry)]
    rates = [step for step in steps if isinstance(step, Rate)]
    return Wanted(
        tuple(step for step in steps if isinstance(step, Cut)),
        rates[0] if rates else None,
        tuple(step for step in steps if isinstance(step, Repository)),
    )


def settle(place: Place, records: Mapping[str, record.Record]) -> None:
    addresses: dict[str, str] = read_json(place.state / "addresses.json") or {}
    wishes = {node: wanted(records.get(node, {}).values()) for node in addresses}
    ports = {node: f"vb-{place.machine(address)}" for node, address in addresses.items()}
    _settle_bridge(place, {node: wish.cuts for node, wish in wishes.items() if wish.cuts}, ports)
    for node, wish in wishes.items():
        _settle_rate(ports[node], wish.rate)
        _settle_view(place, addresses[node], wish.repository)


# --- partitions ------------------------------------------------------------------------------------------


def bridge_table(name: str, cuts: Mapping[str, Iterable[Cut]], ports: Mapping[str, str]) -> str:
    """Frames that the bridge drops, by the cable they come from or go to."""
    rules: dict[str, list[str]] = {"forward": [], "input": [], "output": []}
    for node, wanted_cuts in sorted(cuts.items()):
        port = ports[node]
        for cut in wanted_cuts:
            other = "" if cut.peer in ("all", "host") else ports[cut.peer]
            if cut.direction in ("both", "out"):
                if cut.peer != "host":
                    rules["forward"].append(f'iifname "{port}" ' + (f'oifname "{other}" ' if other else "") + "drop")
                if not other:
                    rules["input"].append(f'iifname "{port}" drop')
            if cut.direction in ("both", "in"):
                if cut.peer != "host":
                    rules["forward"].append((f'iifname "{other}" ' if other else "") + f'oifname "{port}" drop')
                if not other:
                    rules["output"].append(f'oifname "{port}" drop')
    chains = "".join(
        f"    chain {hook} {{\n        type filter hook {hook} priority 0; policy accept;\n"
        + "".join(f"        {line}\n" for line in lines)
        + "    }\n"
        for hook, lines in rules.items()
    )
    return f"table bridge {name}\ndelete table bridge {name}\ntable bridge {name} {{\n{chains}}}\n"


def _settle_bridge(place: Place, cuts: Mapping[str, Iterable[Cut]], ports: Mapping[str, str]) -> None:
    if cuts:
        run("nft", "-f", "-", stdin=bridge_table(place.table, cuts, ports))
    else:
        run("nft", "delete", "table", "bridge", place.table, check=False)


# --- cables ----------------------------------------------------------------------------------------------


def _settle_rate(port: str, rate: Rate | None) -> None:
    found = run("tc", "-json", "qdisc", "show", "dev", port, check=False)
    if found.returncode:
        return  # the node is off, and its cable is gone
    limited = any(qdisc.get("kind") == "tbf" for qdisc in json.loads(found.stdout or "[]"))
    if rate:
        limit = ["rate", f"{rate.kbit}kbit", "burst", "32kb", "latency", "400ms"]
        run("tc", "qdisc", "replace", "dev", port, "root", "tbf", *limit)
    elif limited:
        run("tc", "qdisc", "delete", "dev", port, "root")


def flap(place: Place, address: str, flaps: Flaps) -> None:
    port = f"vb-{place.machine(address)}"
    for _ in range(flaps.times):
        run("ip", "link", "set", port, "down")
        time.sleep(flaps.down_seconds)
        run("ip", "link", "set", port, "up")
        time.sleep(max(flaps.down_seconds, 0.3))  # until its carrier is there again


def plug_in(place: Place, address: str) -> None:
    """A killed flap may have left the cable down."""
    run("ip", "link", "set", f"vb-{place.machine(address)}", "up", check=False)


# --- the repository as one node sees it ------------------------------------------------------------------


def _settle_view(place: Place, address: str, changes: tuple[Repository, ...]) -> None:
    view = place.views / address
    if not changes:
        shutil.rmtree(view, ignore_errors=True)
        return
    mark = hashlib.sha256(f"{mirror.recipe_digest()}{changes}".encode()).hexdigest()
    if (view / ".mark").is_file() and (view / ".mark").read_text() == mark:
        return
    fresh = place.views / f".{address}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    # Linked, not copied: what a view changes it writes anew.
    shutil.copytree(place.apt, fresh / "nvidia", copy_function=os.link)
    _change(place, fresh / "nvidia", changes)
    if any(change.second for change in changes):
        _second(place, fresh / "nvidia-second")
    write_atomically(fresh / ".mark", mark)
    shutil.rmtree(view, ignore_errors=True)
    fresh.rename(view)


def _change(place: Place, folder: Path, changes: tuple[Repository, ...]) -> None:
    debs = sorted(folder.glob("*.deb"))
    for change in changes:
        for deb in debs:
            if change.without and fnmatch.fnmatch(deb.name, change.without):
                deb.unlink(missing_ok=True)
            elif change.postinst and deb.exists() and fnmatch.fnmatch(deb.name, f"{change.postinst[0]}_*.deb"):
                mirror.replace_postinst(deb, change.postinst[1])
    key = None if any(change.strange_key for change in changes) else place.state / "apt-key/secret.asc"
    mirror.publish(folder, key, date=mirror.date_of(place.apt))
    for change in changes:
        for deb in debs:
            if change.truncated and deb.exists() and fnmatch.fnmatch(deb.name, change.truncated):
                data = deb.read_bytes()
                deb.unlink()
                dice = random.Random(f"{change.seed}/{deb.name}")  # noqa: S311 - to be had again, not secret
                deb.write_bytes(data[: dice.randrange(len(data) // 4, len(data) - 1)])
        if change.stale_index:
            for name in ("Packages", "Packages.gz"):
                data = (folder / name).read_bytes()
                (folder / name).unlink()
                (folder / name).write_bytes(data[:-1])


def _second(place: Place, folder: Path) -> None:
    """A repository of newer packages, one of which needs what nobody has."""
    folder.mkdir()
    library = Package("libnvidia-ml1", "999.10-1", "NVIDIA management library (NVML)")
    driver = Package(
        "nvidia-driver-cuda",
        "999.10-1",
        "NVIDIA driver for computing",
        depends="libnvidia-ml1 (= 999.10-1), libnvidia-compute (= 999.10-1)",
    )
    for package in (library, driver):
        mirror.build_package(package, folder / ".root", folder)
    shutil.rmtree(folder / ".root")
    mirror.publish(folder, place.state / "apt-key/secret.asc", label="a second repository")


# --- the machine from which the fleet is run -------------------------------------------------------------


def kill_programs(place: Place, killed: Killed) -> list[int]:
    """Every process of that name which works in this project, and all that it started; at once."""
    project = place.lab.project.resolve()
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            here = (process / "cwd").readlink()
        except OSError:
            continue
        if any(Path(word).name == killed.program for word in words[:2]) and here.is_relative_to(project):
            found.append(int(process.name))
    for pid in _with_children(found):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    marks = record.folder(place) / f"killed-{killed.program}"
    write_atomically(marks, "".join(f"{pid}\n" for pid in found))
    return found


def _with_children(pids: list[int]) -> list[int]:
    found = list(pids)
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(word) for word in children.read_text().split() if int(word) not in found]
    return found


def truncate(place: Place, truncated: Truncated) -> None:
    path = place.lab.project / truncated.file.format(stack=place.lab.stack)
    whole = _kept(place, path)
    if not whole.exists():
        write_atomically(whole, path.read_text(), 0o600)
    text = whole.read_text()
    dice = random.Random(f"{truncated.seed}/{path.name}")  # noqa: S311
    write_atomically(path, text[: dice.randrange(1, max(2, len(text) - 1))], 0o600)


def restore(place: Place, truncated: Truncated) -> None:
    """The file as it was, unless somebody has mended it in his own way."""
    path = place.lab.project / truncated.file.format(stack=place.lab.stack)
    whole = _kept(place, path)
    if whole.exists():
        text = whole.read_text()
        if not path.exists() or text.startswith(path.read_text()):
            write_atomically(path, text, 0o600)
        whole.unlink()


def _kept(place: Place, path: Path) -> Path:
    return record.folder(place) / f"whole-{path.name}.kept"


def forget_killed(place: Place, killed: Killed) -> None:
    (record.folder(place) / f"killed-{killed.program}").unlink(missing_ok=True)
