"""What the lab proves on simulated GPUs, asked of a real one: run on the GPU host itself, as root, with an engine up.

Its record of the GPU layer goes to .gpuyard/hardware/. Look through it; then it may become a fixture of this folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_sandbox import table
from tests.hardware import record
from tests.sandbox import probes

pytestmark = pytest.mark.hardware

PROJECT = Path(__file__).resolve().parents[2]


def said(*command: str | Path, timeout: float = 300) -> str:
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def taken() -> dict[str, str]:
    return record.take()


@pytest.fixture(scope="module")
def engines() -> list[str]:
    listed = said("systemctl", "list-units", "--state=active", "--plain", "--no-legend", "vllm@*.service")
    units = [line.split()[0] for line in listed.splitlines()]
    assert units, "no engine runs here; converge the fleet of this host first"
    return units


def test_the_health_probes_find_every_gpu_and_every_engine(engines: list[str]) -> None:
    checks = [{"check": "check_gpu_count"}, *({"check": "check_service_active", "unit": unit} for unit in engines)]
    verdict = json.loads(said(sys.executable, "-m", "gpuyard.health", json.dumps(checks)))
    print(json.dumps(verdict, indent=1))
    assert verdict["state"] == "Healthy"


def test_real_cuda_lives_in_the_sandbox_and_twenty_doors_are_shut_to_it(
    engines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """That a unit is active says that it generated a token, here on a GPU."""
    assert os.geteuid() == 0, "the trial makes units; run this part as root"
    for unit in engines:
        directory = "/var/cache/vllm/gpuyard-probe"
        found: dict[str, Any] = json.loads(
            said("/usr/bin/python3", probes.__file__, "trial", unit, f"--directory={directory}").splitlines()[-1]
        )
        with capsys.disabled():
            print(table(found))
        assert [probe for probe in found["sandboxed"]["probes"] if probe["result"] != "denied"] == []
        assert [probe for probe in found["bare"]["probes"] if probe["result"] != "open"] == []
        assert found["exposure"] <= 1.5


def test_the_module_is_held_while_an_engine_runs(engines: list[str]) -> None:
    assert int(Path("/sys/module/nvidia/refcnt").read_text()) > 0


def test_the_classes_of_devices_are_those_that_the_unit_allows(taken: dict[str, str]) -> None:
    """`DeviceAllow=char-nvidia*` goes by the names in /proc/devices."""
    classes = record.fields("/proc/devices", taken["/proc/devices"])
    print(sorted(classes))
    assert {"nvidia-uvm"} < classes
    assert all(name.startswith("nvidia") for name in classes)


def test_a_record_is_taken_and_names_nobody(taken: dict[str, str]) -> None:
    folder = PROJECT / ".gpuyard/hardware"
    folder.mkdir(exist_ok=True)
    version = Path("/proc/driver/nvidia/version").read_text().split("  ")[1].split()[0]
    path = folder / f"{version}.json"
    path.write_text(json.dumps(taken, indent=1) + "\n")
    print(f"the record lies in {path}")
    assert record.redacted(taken, set()) == taken
    for place in ("nvidia-smi -q -x", "nvidia-smi -L", "/proc/driver/nvidia/version"):
        assert not taken[place].startswith("no answer"), taken[place]
