"""Set up all that gpuyard needs, in the project and in the user's cache. Run it as often as you like.

    tools/setup [STEP...]        without names: every step

What is there already is left alone, what is missing is made, side by side where it can be. Whatever is downloaded is
pinned and checked: Python packages by the hashes of requirements/, Go modules by tools/pulumi/go.sum, Debian packages
by the signatures of their archive.

Exit code: 0 all stands; 1 something failed; 3 nothing failed, but some steps need root and this user may not become it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from steps import machine, nodes, pulumi
from steps.ground import DEBIAN_ARCHIVE, PYTHON_INDEX, cache, put
from steps.stepper import FAILED, NOT_RUN, SetupError, Step, Stepper, clock, in_order, interrupted, table

STEPS: Mapping[str, Step] = {
    step.name: step
    for step in (
        Step("state", machine.state_ready, machine.make_state, seconds=30),
        Step("debs", machine.debs_ready, machine.make_debs, seconds=900, gib=0.2, source=DEBIAN_ARCHIVE),
        Step("haproxy", machine.haproxy_ready, machine.make_haproxy, needs=("debs",), source=DEBIAN_ARCHIVE),
        Step("uv", machine.uv_ready, machine.make_uv, needs=("debs",), seconds=300, gib=0.1, source=PYTHON_INDEX),
        Step(
            "python",
            machine.python_ready,
            machine.make_python,
            needs=("uv",),
            source="uv's Python builds, as no Python of 3.12 or later was found on PATH or in ~/.pyenv",
        ),
        Step(
            "venv",
            machine.venv_ready,
            machine.make_venv,
            needs=("uv", "python"),
            seconds=900,
            gib=1.5,
            source=PYTHON_INDEX,
        ),
        Step(
            "pulumi",
            pulumi.pulumi_ready,
            pulumi.make_pulumi,
            needs=("uv", "state"),
            seconds=3600,
            gib=3.5,
            source="a Go module proxy (and, where no Go is installed, a Python package index)",
        ),
        Step("root", nodes.root_ready, nodes.make_root, needs=("debs",), seconds=1200, gib=0.5, source=DEBIAN_ARCHIVE),
        Step("nvml", nodes.nvml_ready, nodes.make_nvml, needs=("root",), gib=0.1, source=DEBIAN_ARCHIVE),
        Step(
            "qemu",
            lambda: machine.debs_ready(machine.QEMU_PACKAGES),
            lambda work: machine.make_debs(work, machine.QEMU_PACKAGES),
            needs=("debs",),
            seconds=900,
            gib=0.2,
            source=DEBIAN_ARCHIVE,
        ),
        Step(
            "browser",
            lambda: machine.debs_ready(machine.BROWSER_PACKAGES),
            lambda work: machine.make_debs(work, machine.BROWSER_PACKAGES),
            needs=("debs",),
            seconds=900,
            gib=0.4,
            source=DEBIAN_ARCHIVE,
        ),
        Step("vm", nodes.vm_ready, nodes.make_vm, needs=("debs",), seconds=1200, gib=3, source=DEBIAN_ARCHIVE),
        Step(
            "engine",
            nodes.engine_ready,
            nodes.make_engine,
            needs=("root", "uv"),
            seconds=3600,
            gib=6.5,
            source=PYTHON_INDEX,
        ),
        Step(
            "locked-engines",
            nodes.locked_engines_ready,
            nodes.make_locked_engines,
            # Most fleets are locked to the very tree that `engine` makes, and further ones share its files.
            needs=("engine",),
            seconds=3600,
            gib=6.5,
            source=PYTHON_INDEX,
        ),
        Step("engine-sim", nodes.engine_sim_ready, nodes.make_engine_sim, needs=("root", "uv"), seconds=300),
        Step(
            "model", nodes.model_ready, nodes.make_model, needs=("engine",), seconds=1200, gib=1.2, source=PYTHON_INDEX
        ),
    )
}


def refuse_a_full_disk(names: Sequence[str]) -> None:
    missing = {name: STEPS[name].gib for name in names if STEPS[name].gib and STEPS[name].ready() is None}
    need, have = sum(missing.values()), shutil.disk_usage(cache()).free / (1 << 30)
    if need > have:
        raise SetupError(
            "SETUP-DISK",
            f"{cache()} has {have:.1f} GiB free and {need:.1f} are needed ({', '.join(missing)}); free some space, or "
            "set GPUYARD_CACHE to a folder on a larger disk",
        )


@contextlib.contextmanager
def one_at_a_time(patience: float) -> Iterator[int]:
    """One set-up at a time for each cache; the second waits, and then finds the work done."""
    lock = os.open(cache() / "setup.lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience
    told = False
    try:
        while not taken(lock):
            if time.monotonic() > deadline:
                raise SetupError(
                    "SETUP-BUSY",
                    f"another set-up still works in {cache()} after {clock(patience)}; let it end, or end it",
                )
            if not told:
                print(f"another set-up works in {cache()}: waiting for it", flush=True)
                told = True
            time.sleep(0.5)
        yield lock
    finally:
        os.close(lock)


def taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def give_back_to_the_user() -> None:
    """Run through sudo we are someone else: what a later set-up of the user's own writes to must be theirs."""
    if os.geteuid() == 0 and "SUDO_UID" in os.environ:
        for path in [cache(), cache() / "setup.lock", cache() / "logs", *(cache() / "logs").iterdir()]:
            os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/setup", description="Set up all that gpuyard needs, or the named steps."
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"one of: {', '.join(STEPS)}")
    names = parser.parse_args(arguments).steps or list(STEPS)
    logs = cache() / "logs"
    try:
        wanted = in_order(STEPS, names)
        logs.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(3600) as lock:
            began = time.monotonic()
            refuse_a_full_disk(wanted)
            results = Stepper(STEPS, logs, (lock,)).run(wanted)
            seconds = time.monotonic() - began
            steps = {name: [result.outcome, round(result.seconds, 1)] for name, result in results.items()}
            put(logs / "setup.json", json.dumps({"seconds": round(seconds, 1), "steps": steps}).encode(), 0o644)
            give_back_to_the_user()
    except SetupError as refusal:
        print(refusal, file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"SETUP-CACHE: {error.filename}: {error.strerror}; the cache must be a folder this user can write to: "
            "mend it, or set GPUYARD_CACHE to another",
            file=sys.stderr,
        )
        return 1
    print(f"\n{table(results)}\n  all together {clock(seconds)}", flush=True)
    outcomes = {result.outcome for result in results.values()}
    return 1 if FAILED in outcomes else 3 if NOT_RUN in outcomes else 0


if __name__ == "__main__":
    os.umask(0o022)
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    sys.exit(main(sys.argv[1:]))
