"""Run every test this machine can run, part by part, and list what was not run and why.

    python tools/test.py [PART...]       without names: all, in this order

    lint, unit, engine, lab, relock, qemu, contract, molecule, hardware

Without names the lab's tests, which mostly wait for machines, run beside most of the others, which are told afterwards.
A part that fails does not keep the next from running. Exit code 0 only if nothing failed. With CI=true a part that this
machine could not run, and a test that was skipped, are failures too: a green run must mean that all of it was there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
REPORTS = "GPUYARD_TEST_REPORTS"
REPORTS_FILE = os.environ.pop(REPORTS, "")
"""Where a process that runs some of the parts beside others writes their reports; what it runs is not told of it."""
TOLD_LINES = 30
"""How much of what a scenario printed is told again where it failed."""
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

CHECKS: Mapping[str, Sequence[str]] = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "pyright": ["pyright"],
    "lint-imports": ["lint-imports"],
    "yamllint": ["yamllint", "--strict", "."],
    "ansible-lint": ["ansible-lint", "--profile", "production", "--offline", "--nocolor", "-q"],
}
# ansible-lint checks the syntax of roles and playbooks; that no fleet is there must not stop it.
CHECK_ENVIRONMENT = {"ANSIBLE_INVENTORY_UNPARSED_FAILED": "false", "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "false"}


@dataclass
class Report:
    """What came of one part."""

    passed: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    """What failed, as far as it has a name, with the beginning of the reason; a part may fail outside of its tests."""
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0
    not_run: str = ""

    @property
    def result(self) -> str:
        return "not run" if self.not_run else "failed" if self.failed else "passed"

    def line(self, name: str) -> str:
        """As pytest ends: the counts that are not zero, and the time."""
        counts = [(self.failed, "failed"), (self.passed, "passed"), (len(self.skipped), "skipped")]
        words = ", ".join(f"{count} {word}" for count, word in counts if count) or "nothing"
        return f"{name}: {words} in {self.seconds:.1f}s"


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[int], Report]
    seconds: int
    """The longest it may take."""
    hindrance: Callable[[], str] = lambda: ""
    """Why this machine cannot run it; nothing where it can."""
    always_in_ci: bool = True
    only_by_name: str = ""
    """Why it is run only where it is named; nothing where it is part of every run."""
    beside: bool = False
    """Whether a run of all has it beside the others, with what time the processors have left."""


# --- the kinds of parts ------------------------------------------------------------------------------------------


def lint(seconds: int) -> Report:
    """All the checks, two at a time; each prints when it has ended."""

    def check(name: str) -> bool:
        began = time.monotonic()
        code, said = captured(CHECKS[name], seconds, CHECK_ENVIRONMENT)
        print(f"  {name:<12} {'failed' if code else 'passed'} in {time.monotonic() - began:.1f}s", flush=True)
        if code:
            print("\n".join(f"    {line}" for line in said.rstrip().splitlines()), flush=True)
        return code == 0

    with ThreadPoolExecutor(max_workers=2) as pool:
        # The slowest first.
        results = dict(zip(reversed(CHECKS), pool.map(check, reversed(CHECKS)), strict=True))
    failures = [name for name, passed in results.items() if not passed]
    return Report(passed=len(results) - len(failures), failed=len(failures), failures=failures)


def pytest(marks: str) -> Callable[[int], Report]:
    def run(seconds: int) -> Report:
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder) / "junit.xml"
            code = ended(["pytest", "-m", marks, f"--junitxml={junit}"], seconds)
            report = read_junit(junit)
        if code == 5:
            print(f"no test carries the mark `{marks}`: a part without tests proves nothing", flush=True)
        # Killed, or failed outside a test: what it had counted until then does not say so.
        if code and not report.failed:
            report.failed = 1
        return report

    return run


def read_junit(path: Path) -> Report:
    if not path.is_file():
        return Report()
    report = Report()
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314 - pytest wrote it a moment ago
        name = f"{case.get('classname')}::{case.get('name')}"
        broken = [found for kind in ("failure", "error") if (found := case.find(kind)) is not None]
        if broken:
            report.failed += 1
            report.failures.append(f"{name}: {broken[0].get('message', '')}".splitlines()[0][:200])
        elif (skipped := case.find("skipped")) is not None:
            report.skipped.append(f"{name}: {skipped.get('message', '')}")
        else:
            report.passed += 1
    return report


def scenarios() -> list[str]:
    """`default` owns the nodes the others share: it is part of every run and no scenario of its own."""
    found = (path.parent.name for path in PROJECT.glob("molecule/*/molecule.yml"))
    return sorted(name for name in found if name != "default")


def molecule(seconds: int) -> Report:
    """One scenario after the other, on nodes that are made before the first and removed after the last.

    `molecule test --all` does the same, stops at the first that fails, and does not say what of the others.
    """
    deadline = time.monotonic() + seconds
    said: list[str] = []
    report = Report()

    def passes(name: str, *command: str, least: int = 1) -> bool:
        began = time.monotonic()
        code, printed = captured(["molecule", *command], max(least, int(deadline - began)))
        print(printed, end="", flush=True)
        said.append(f"  {name:<16} {'failed' if code else 'passed'} in {time.monotonic() - began:.1f}s")
        if code:
            report.failed += 1
            report.failures.append(name)
            # Where a long run is cut to its end, why one failed is told with that it failed.
            said.extend(f"    {line}" for line in printed.splitlines()[-TOLD_LINES:])
        return code == 0

    try:
        # What a killed run left goes first: molecule would take its nodes for made, whether or not they still are.
        if passes("destroy", "destroy") and passes("create", "create"):
            for name in scenarios():
                report.passed += passes(name, "test", "--scenario-name", name, "--destroy=never")
    finally:
        # Also when the others have had all the time.
        passes("destroy", "destroy", least=60)
        print("\n".join(said), flush=True)
    return report


# --- what this machine cannot do ---------------------------------------------------------------------------------


def lab_hindrance() -> str:
    if sys.platform != "linux":
        return "the lab's nodes are Linux machines and this is none"
    if hindrance := lacking("systemd-nspawn", "nft"):
        return hindrance
    return root_hindrance()


def lacking(*programs: str) -> str:
    missing = [program for program in programs if not shutil.which(program, path=system_path())]
    return f"{', '.join(missing)} not installed; run `make setup`" if missing else ""


def root_hindrance() -> str:
    if os.geteuid() == 0:
        return ""
    asked = ["sudo", "-n", "-l", sys.executable, "-m", "gpuyard.lab"]
    if not shutil.which("sudo") or subprocess.run(asked, capture_output=True, check=False).returncode:
        return "the lab needs root, and this is neither root nor allowed to become it without a password"
    return ""


def molecule_hindrance() -> str:
    return lab_hindrance() or ("" if scenarios() else "there is no scenario in molecule/")


def qemu_hindrance() -> str:
    return lacking("qemu-system-x86_64", "qemu-img") or root_hindrance()


def hardware_hindrance() -> str:
    return "" if Path("/proc/driver/nvidia/version").is_file() else "no NVIDIA GPU with a loaded driver on this machine"


def system_path() -> str:
    """Where root finds programs: a user's PATH often lacks the folders for administration."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


PARTS = [
    Part("lint", lint, 1800, beside=True),
    Part("unit", pytest("not engine and not lab and not qemu and not contract and not hardware"), 2400, beside=True),
    Part("engine", pytest("engine and not lab"), 1800, beside=True),
    Part("lab", pytest("lab and not relock"), 4800, lab_hindrance),
    Part(
        "relock",
        pytest("relock"),
        2400,
        lab_hindrance,
        always_in_ci=False,
        only_by_name="two versions of the real engine, one after the other; `make test-relock` runs it",
    ),
    Part(
        "qemu", pytest("qemu"), 2400, qemu_hindrance, always_in_ci=False, only_by_name="slow; `make test-qemu` runs it"
    ),
    Part("contract", pytest("contract"), 1800, root_hindrance, beside=True),
    Part("molecule", molecule, 3600, molecule_hindrance, beside=True),
    Part("hardware", pytest("hardware"), 3600, hardware_hindrance, always_in_ci=False),
]


# --- running, and saying what came of it -------------------------------------------------------------------------


def ended(command: Sequence[str], seconds: int, output: object = None, more: Mapping[str, str] | None = None) -> int:
    """The exit code of a command, or that of one we had to kill because its time was over."""
    child = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}", **(more or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    if REPORTS_FILE:
        # Linux shares the processors out among sessions first, and a session's own niceness does not count there.
        with suppress(OSError):
            Path(f"/proc/{child.pid}/autogroup").write_text("10")
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"`{' '.join(command)}` was stopped: it had {seconds} s", file=output or sys.stdout, flush=True)
        return 124
    finally:
        # Also on Ctrl-C, which does not reach a session of its own; a moment to clean up, then the rest of it.
        end(child, (signal.SIGINT, 30), (signal.SIGKILL, 10))


def captured(command: Sequence[str], seconds: int, more: Mapping[str, str] | None = None) -> tuple[int, str]:
    """As `ended`, and all that it printed."""
    with tempfile.TemporaryFile("w+") as output:
        code = ended(command, seconds, output, more)
        output.seek(0)
        return code, output.read()


def end(child: subprocess.Popen[Any], *ways: tuple[signal.Signals, float]) -> None:
    """End a session that has not ended: a signal, and how many seconds it has to work, one after the other."""
    for number, patience in ways:
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                continue


@contextmanager
def beside(names: Sequence[str]) -> Iterator[Callable[[], dict[str, Report]]]:
    """Parts in a process of their own, one after the other; what it said is told when their reports are asked for."""
    if not names:
        yield dict
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        reports = Path(folder) / "reports.json"
        child = subprocess.Popen(
            ["nice", "-n", "10", sys.executable, __file__, *names],
            cwd=PROJECT,
            env={**os.environ, REPORTS: str(reports)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def told() -> dict[str, Report]:
            child.wait()
            output.seek(0)
            print(output.read(), end="", flush=True)
            found = json.loads(reports.read_text()) if reports.is_file() else {}
            return {name: Report(**found[name]) if name in found else Report(failed=1) for name in names}

        try:
            yield told
        finally:
            end(child, (signal.SIGINT, 120), (signal.SIGKILL, 10))


def take(part: Part) -> Report:
    began = time.monotonic()
    if hindrance := part.hindrance():
        report = Report(not_run=hindrance, failed=int(IN_CI and part.always_in_ci))
        print(f"\n=== {part.name}: not run: {hindrance}", flush=True)
        return report
    print(f"\n=== {part.name}", flush=True)
    report = part.run(part.seconds)
    report.seconds = time.monotonic() - began
    if IN_CI and part.always_in_ci:
        # A test that is skipped here would be skipped everywhere.
        report.failed += len(report.skipped)
    return report


def summary(reports: Mapping[str, Report], took: float | None) -> str:
    rows = [("part", "result", "passed", "failed", "skipped", "time")]
    if took is not None:
        rows.append(("setup", "passed", "", "", "", f"{took:.0f} s"))
    for name, report in reports.items():
        counts = (report.passed, report.failed, len(report.skipped))
        rows.append((name, report.result, *map(str, counts), f"{report.seconds:.0f} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    not_run = [f"  {name}: {report.not_run}" for name, report in reports.items() if report.not_run]
    not_run += [f"  {name}: {test}" for name, report in reports.items() for test in report.skipped]
    failures = [f"  {name}: {test}" for name, report in reports.items() for test in report.failures]
    failed = sum(report.failed for report in reports.values())
    return "\n".join(
        [
            "",
            *table,
            "",
            *(["Not run:", *not_run] if not_run else ["Nothing was left out."]),
            "",
            *(report.line(name) for name, report in reports.items() if not report.not_run),
            # Last: who keeps no more than the end of a long output has the names.
            *(["Failed:", *failures] if failures else []),
            f"{sum(report.passed for report in reports.values())} passed, {failed} failed",
        ]
    )


def setup_seconds() -> float | None:
    """How long the set-up of this run took, from what it wrote down."""
    cache = os.environ.get("GPUYARD_CACHE")
    written = Path(cache) / "logs/setup.json" if cache else None
    return json.loads(written.read_text())["seconds"] if written and written.is_file() else None


def main(names: Sequence[str]) -> int:
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        print(f"TEST-PART: there is no part {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    reports: dict[str, Report] = {}
    took = setup_seconds()  # now: a test may set something up, too
    aside = [] if names else [name for name in known if known[name].beside]
    try:
        with beside(aside) as of_those:
            for name in names or [name for name in known if name not in aside]:
                if names or not (why := known[name].only_by_name):
                    reports[name] = take(known[name])
                else:
                    reports[name] = Report(not_run=why)
            reports |= of_those()
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        return 130
    if REPORTS_FILE:
        Path(REPORTS_FILE).write_text(json.dumps({name: asdict(report) for name, report in reports.items()}))
    else:
        print(summary({name: reports[name] for name in known if name in reports}, took), flush=True)
    return 1 if any(report.failed for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
