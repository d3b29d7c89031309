"""Break and mend: the record first, then this machine, then the node; and the way back from wherever one was killed.

A step on a node goes over the lab's own login as a script on standard input. What waits (`--after`) is a process of
the lab that sleeps and then breaks; it outlives the command that began it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from gpuyard.lab import nodes
from gpuyard.lab.errors import LabError
from gpuyard.lab.faults import host_side, record, words
from gpuyard.lab.faults.model import (
    CONTROLLER,
    NEEDS,
    Cut,
    Dark,
    Fault,
    Flaps,
    Injection,
    Killed,
    OnNode,
    Step,
    Truncated,
    UsageError,
    nearest,
)
from gpuyard.lab.faults.record import BREAKING, BROKEN, FAILED, MENDING, WAITING, Entry
from gpuyard.lab.faults.table import FAULTS, fault_named, values_in
from gpuyard.lab.host import Process, end, run, start
from gpuyard.lab.models import NodeState
from gpuyard.lab.place import FORMAT, Place, read_json

NODE_SECONDS = 240
BREAKS_LAST = ("power-cut", "partition")
"""After these a node does not answer any more; so they are also mended first."""


def break_(
    place: Place, node: str, fault: str, gpu: int | None, seed: int, words: Sequence[str], after: float
) -> dict[str, Any]:
    """Break one thing, now or later. It is broken wholly, or not at all and said why."""
    chosen = fault_named(fault)
    values = values_in(words)
    with _locked(place, node):
        state = _node(place, node)
        injection = chosen.chosen(state.spec if state else None, gpu, seed, values)
        for step in chosen.steps(injection):
            if isinstance(step, Cut) and step.peer not in ("all", "host"):
                _peer(place, node, step.peer)
        found = record.read(place, node)
        if fault in found:
            raise LabError(
                "FAULT-TWICE",
                f"{fault} is {found[fault].stage} on {node}",
                "a fault is broken once",
                f"gpuyard lab mend {node} {fault}",
            )
        if after:
            entry = Entry(injection, WAITING, due=round(time.time() + after, 3))
            record.write(place, node, {**found, fault: entry})
            _wait_in_the_background(place, node, fault)
        else:
            _refuse_what_lacks(place, state, chosen, injection)
            entry = _broken(place, state, injection)
        return told(node, entry)


def mend(place: Place, node: str, fault: str | None) -> list[str]:
    """Mend one fault, or without a name all of them; also of a record that cannot be believed."""
    if fault:
        fault_named(fault)
    with _locked(place, node):
        state = _node(place, node)
        try:
            found = record.read(place, node)
        except LabError:
            if fault:
                raise
            found = _whatever_may_be(state)
        if fault and fault not in found:
            there = f"mend one of {', '.join(found)}" if found else "break something first"
            raise LabError("FAULT-WHOLE", f"{fault} is not broken on {node}", "there is nothing to mend", there)
        mended = [fault] if fault else sorted(found, key=lambda name: (name not in BREAKS_LAST, name))
        for name in mended:
            _mended(place, state, found, name)
        return mended


def read(place: Place) -> list[dict[str, Any]]:
    """All that is broken, or waits to be."""
    rows: list[dict[str, Any]] = []
    for node, found in record.read_all(place).items():
        for entry in found.values():
            row = told(node, entry)
            if entry.stage == WAITING and not _waits(place, node, entry.injection.fault):
                row["said"] = "the process that waited is gone; mend it and break it again"
            rows.append(row)
    return rows


def fire(place: Place, node: str, fault: str) -> None:
    """What waited is due: break it, or write down why not."""
    with _locked(place, node):
        found = record.read(place, node)
        entry = found.get(fault)
        if entry is None or entry.stage != WAITING:
            return
        try:
            state = _node(place, node)
            _refuse_what_lacks(place, state, FAULTS[fault], entry.injection)
            _broken(place, state, entry.injection)
        except LabError as refused:
            record.write(place, node, {**record.read(place, node), fault: entry.at(FAILED, str(refused))})


def forget(place: Place, node: str) -> None:
    """A node that is gone has no faults; its cable and its disk went with it."""
    for process in (record.folder(place) / "waiting").glob(f"{node}.*"):
        end(place, _name(node, process.name.split(".", 1)[1]), process)
    (record.folder(place) / f"{node}.json").unlink(missing_ok=True)
    if (place.state / "lab.json").is_file():
        host_side.settle(place, record.read_all(place))


def told(node: str, entry: Entry) -> dict[str, Any]:
    injection = entry.injection
    return {
        "node": node,
        "fault": injection.fault,
        "stage": entry.stage,
        "gpu": injection.gpu if FAULTS[injection.fault].of_gpu else None,
        "seed": injection.seed,
        "parameters": dict(injection.values),
        "due": entry.due or None,
        "said": entry.said,
    }


# --- breaking and mending --------------------------------------------------------------------------------


def _broken(place: Place, node: NodeState | None, injection: Injection) -> Entry:
    name = node.name if node else CONTROLLER
    found = record.read(place, name)
    entry = Entry(injection, BREAKING)
    record.write(place, name, {**found, injection.fault: entry})
    try:
        host_side.settle(place, record.read_all(place))
        steps = host_side.steps_of(entry)
        _once(place, node, steps)
        on_node = [step for step in steps if isinstance(step, OnNode)]
        if node and on_node:
            _run_on(place, node, words.breaking(injection.fault, on_node))
    except BaseException:
        _mended(place, node, record.read(place, name), injection.fault)
        raise
    entry = entry.at(BROKEN)
    record.write(place, name, {**found, injection.fault: entry})
    return entry


def _once(place: Place, node: NodeState | None, steps: Sequence[Step]) -> None:
    """What happens once and is over, unlike that which is settled."""
    for step in steps:
        if isinstance(step, Dark) and node:
            end(place, node.name, place.node(node.name) / "process.json")
        elif isinstance(step, Flaps) and node:
            _run_on(place, node, words.breaking("link-flaps", []))
            host_side.flap(place, node.address, step)
        elif isinstance(step, Killed):
            host_side.kill_programs(place, step)
        elif isinstance(step, Truncated):
            host_side.truncate(place, step)


def _mended(place: Place, node: NodeState | None, found: record.Record, fault: str) -> None:
    """One fault taken back, from whatever stage, and struck from the record."""
    name = node.name if node else CONTROLLER
    process = record.folder(place) / "waiting" / f"{name}.{fault}"
    end(place, _name(name, fault), process)
    entry = found[fault]
    steps = host_side.steps_of(entry)
    if entry.stage not in (WAITING, FAILED):
        found[fault] = entry.at(MENDING)
        record.write(place, name, found)
        host_side.settle(place, record.read_all(place))
        for step in steps:
            if isinstance(step, Truncated):
                host_side.restore(place, step)
            elif isinstance(step, Killed):
                host_side.forget_killed(place, step)
            elif isinstance(step, Flaps) and node:
                host_side.plug_in(place, node.address)
            elif isinstance(step, Dark) and node:
                nodes.up(place, node.spec)
        if node and any(isinstance(step, OnNode | Flaps) for step in steps):
            on_node = [step for step in steps if isinstance(step, OnNode)]
            _run_on(place, node, words.mending(fault, on_node))
    del found[fault]
    record.write(place, name, found)


def _whatever_may_be(node: NodeState | None) -> record.Record:
    """For a record that is not believed: every fault there is, each of which finds out what there is to mend."""
    chosen: record.Record = {}
    for fault in FAULTS.values():
        if (node is None) == (fault.target == CONTROLLER):
            spec = node.spec if node else None
            if not fault.of_gpu or (spec and spec.gpu_count):
                chosen[fault.id] = Entry(fault.chosen(spec, None, 0, {}), BROKEN)
    return chosen


def _refuse_what_lacks(place: Place, node: NodeState | None, fault: Fault, injection: Injection) -> None:
    if node is None:
        return
    if not nodes.read(place, node.name) or not _runs(place, node.name):
        raise LabError(
            "FAULT-OFF", f"{node.name} is off", "there is nothing to break", "run `pulumi up`, or mend power-cut"
        )
    on_node = any(isinstance(step, OnNode | Flaps) for step in fault.steps(injection))
    if not (on_node or fault.needs):
        return
    asked = "\n".join(f"( {NEEDS[need].ask} ) || echo 'lacks:{need}'" for need in fault.needs)
    patches = f"cd {words.PATCHES} 2>/dev/null && grep -H . -- * || true"
    said = _run_on(place, node, f"export LC_ALL=C\n{asked}\n{patches}\n").splitlines()
    for line in said:
        name, _, text = line.partition(":")
        if name == "lacks":
            what = NEEDS[text].what
            change = f"break a node that has {what}"
            raise LabError("FAULT-NEEDS", f"{node.name} has not {what}", f"{fault.id} breaks it", change)
        if text not in _patches(place, node).get(name, ""):
            raise LabError(
                "FAULT-STATE",
                f"{words.PATCHES}/{name} on {node.name} is not as `gpuyard lab break` wrote it",
                "what the GPUs are now would be nobody's fault",
                f"remove it there and run `{words.APPLY}`",
            )


def _patches(place: Place, node: NodeState) -> dict[str, str]:
    """The patches over a node's hardware that we wrote, as the steps that wrote them."""
    return {
        f"{fault}.json": step.do
        for fault, entry in record.read(place, node.name).items()
        for step in host_side.steps_of(entry)
        if isinstance(step, OnNode) and words.PATCHES in step.do
    }


# --- later -----------------------------------------------------------------------------------------------


def _wait_in_the_background(place: Place, node: str, fault: str) -> None:
    folder = record.folder(place) / "waiting"
    folder.mkdir(exist_ok=True)
    log = folder / f".{node}.{fault}.log"
    where = [str(place.lab.project), place.lab.stack, str(place.cache)]
    command = [sys.executable, "-B", "-m", "gpuyard.lab.faults.later", *where, node, fault]
    start(place, _name(node, fault), folder / f"{node}.{fault}", log, command)


def _waits(place: Place, node: str, fault: str) -> bool:
    process = Process.recorded(record.folder(place) / "waiting" / f"{node}.{fault}")
    return process is not None and process.alive


def _name(node: str, fault: str) -> str:
    return f"fault-{node}-{fault}"


# --- nodes -----------------------------------------------------------------------------------------------


def _locked(place: Place, node: str) -> Any:
    return place.lock(f"{node}.faults")


def _node(place: Place, name: str) -> NodeState | None:
    found = read_json(place.state / "lab.json")
    if found is None:
        raise LabError("LAB-EMPTY", f"the lab {place.lab.stack} has no nodes", change="run `gpuyard lab up`")
    if found.get("format", 1) != FORMAT:
        raise LabError(
            "LAB-FORMAT",
            f"the lab {place.lab.stack} has format {found.get('format', 1)}",
            f"this gpuyard breaks nodes of format {FORMAT}; those of an older one lack the kernel's log",
            "`gpuyard lab down`, then `gpuyard lab up`",
        )
    if name == CONTROLLER:
        return None
    if state := nodes.read(place, name):
        return state
    known = [state.name for state in nodes.read_all(place)]
    raise UsageError(f"no node {name} in {place.lab.stack}", nearest(name, known) or "run `gpuyard lab up`")


def _peer(place: Place, node: str, peer: str) -> None:
    known = [state.name for state in nodes.read_all(place) if state.name != node]
    if peer not in known:
        raise UsageError(f"no node {peer} beside {node}", nearest(peer, [*known, "all", "host"]))


def _runs(place: Place, name: str) -> bool:
    state = nodes.read(place, name)
    return state is not None and state.running


def _run_on(place: Place, node: NodeState, script: str) -> str:
    login = nodes.ssh_command(place, node.address)
    quick = [*login[:-1], "-o", "ConnectTimeout=10", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", login[-1]]
    try:
        done = subprocess.run(
            [*quick, "sh", "-s"], input=script, capture_output=True, text=True, check=False, timeout=NODE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise LabError("FAULT-NODE", f"{node.name} did not end it in {NODE_SECONDS} s") from error
    said = (done.stderr or done.stdout).strip()
    if done.returncode == 255:
        raise LabError(
            "FAULT-UNREACHABLE",
            f"{node.name} does not take a login",
            said,
            f"mend what keeps it away: `gpuyard lab mend {node.name} --all`",
        )
    if done.returncode:
        raise LabError("FAULT-NODE", f"a step on {node.name} ended with {done.returncode}", said)
    return done.stdout


# --- asking ----------------------------------------------------------------------------------------------


def seen(place: Place, node: str, injection: Injection) -> bool:
    """Whether ordinary tools see the fault: the table's own question, asked where it has to be asked."""
    state = _node(place, node)
    probe = FAULTS[injection.fault].probe(injection)
    if probe.where == "host":
        addresses: dict[str, str] = read_json(place.state / "addresses.json") or {}
        names = {f"peer_{name.replace('-', '_')}": address for name, address in addresses.items()}
        names |= {"project": str(place.lab.project), "stack": place.lab.stack}
        if state:
            names |= {"address": state.address, "login": " ".join(nodes.ssh_command(place, state.address))}
        knock = "import socket, sys; socket.create_connection((sys.argv[1], 22), 2).recv(1)"
        script = "".join(f"{name}={shlex.quote(value)}\n" for name, value in names.items())
        script += f'answers() {{ {sys.executable} -c "{knock}" $address 2>/dev/null; }}\n'
        return run("sh", "-c", script + probe.ask, check=False).returncode == 0
    if state is None:
        return False
    done = subprocess.run(
        [*nodes.ssh_command(place, state.address), "sh", "-s"],
        input=words.asking(injection, probe.ask),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode == 0
