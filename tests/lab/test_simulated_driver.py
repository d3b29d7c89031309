"""The simulated user side of the driver, run as a program over a folder that plays the node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuyard.lab.packages import recipes

VERSION = "580.126.20"
LOADED = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (gpuyard@lab)\n"


class Node:
    def __init__(self, root: Path, gpus: int = 2) -> None:
        self.root = root
        (root / "usr/bin").mkdir(parents=True)
        for package in recipes.driver(VERSION):
            for path, text in package.programs.items():
                (root / path).write_text(text)
        self.plug(gpus)

    def plug(self, gpus: int, switches: int = 0) -> None:
        board = {
            "name": "NVIDIA H100 80GB HBM3",
            "device": "0x2330",
            "memory_mib": 81559,
            "power_w": 700,
            "compute": "9.0",
            "serial": "1",
        }
        boards = [{**board, "bdf": f"0000:{n + 16:02x}:00.0", "uuid": f"GPU-{n}"} for n in range(gpus)]
        self.write(
            "var/lib/gpuyard-lab/gpus.json",
            json.dumps({"gpus": boards, "switches": [{"bdf": "0000:05:00.0"}] * switches}),
        )

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def install_library(self, version: str) -> None:
        self.write(f"{recipes.LIBRARIES}/libnvidia-ml.so.{version}", version)
        (self.root / recipes.LIBRARIES / "libnvidia-ml.so.1").symlink_to(f"libnvidia-ml.so.{version}")

    def load(self, version: str) -> None:
        self.write("proc/driver/nvidia/version", LOADED.format(version))

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GPUYARD_LAB_ROOT": str(self.root)}
        return subprocess.run(
            [sys.executable, self.root / "usr/bin" / program, *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=30,
        )

    def smi(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("nvidia-smi", *words)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def ready(node: Node) -> Node:
    node.install_library(VERSION)
    node.load(VERSION)
    return node


def test_without_the_library_it_ends_with_12(node: Node) -> None:
    assert node.smi().returncode == 12


def test_without_a_loaded_driver_it_ends_with_9_and_the_vendors_sentence(node: Node) -> None:
    node.install_library(VERSION)
    done = node.smi()
    assert done.returncode == 9
    assert "couldn't communicate with the NVIDIA driver" in done.stdout


def test_another_driver_loaded_than_installed_ends_with_18(node: Node) -> None:
    node.install_library(VERSION)
    node.load("580.105.08")
    done = node.smi("-L")
    assert done.returncode == 18
    assert done.stdout.startswith("Failed to initialize NVML: Driver/library version mismatch\n")


def test_without_a_gpu_it_ends_with_6(ready: Node) -> None:
    ready.plug(0)
    assert ready.smi().returncode == 6


def test_the_list_names_every_gpu(ready: Node) -> None:
    assert ready.smi("-L").stdout == (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"
    )


def test_a_query_answers_with_header_and_units_or_without(ready: Node) -> None:
    query = "--query-gpu=index,driver_version,memory.total,power.limit,utilization.gpu"
    assert ready.smi(query, "--format=csv").stdout.splitlines() == [
        "index, driver_version, memory.total [MiB], power.limit [W], utilization.gpu [%]",
        f"0, {VERSION}, 81559 MiB, 700.00 W, 0 %",
        f"1, {VERSION}, 81559 MiB, 700.00 W, 0 %",
    ]
    plain = ready.smi(query, "--format=csv,noheader,nounits", "-i", "1").stdout
    assert plain == f"1, {VERSION}, 81559, 700.00, 0\n"


@pytest.mark.parametrize(
    "words",
    [("--query-gpu=index,colour", "--format=csv"), ("--query-gpu=index",), ("--paint",)],
    ids=["unknown field", "no format", "unknown option"],
)
def test_a_question_it_does_not_know_ends_with_2(ready: Node, words: tuple[str, ...]) -> None:
    assert ready.smi(*words).returncode == 2


def test_the_overview_is_a_table_whose_lines_are_equally_long(ready: Node) -> None:
    lines = [line for line in ready.smi().stdout.splitlines()[1:] if line]
    assert {len(line) for line in lines} == {91}
    assert f"Driver Version: {VERSION}" in lines[1]
    assert "CUDA Version: 13.0" in lines[1]


@pytest.mark.parametrize("program", ["nvidia-persistenced", "nv-fabricmanager"])
@pytest.mark.parametrize("loaded", [None, "580.105.08"])
def test_a_daemon_refuses_a_driver_that_is_not_its_own(node: Node, program: str, loaded: str | None) -> None:
    node.plug(8, switches=4)
    if loaded:
        node.load(loaded)
    done = node.run(program)
    assert done.returncode == 1
    assert (loaded or "") in done.stderr


def test_the_fabric_manager_has_nothing_to_do_without_a_switch(ready: Node) -> None:
    done = ready.run("nv-fabricmanager")
    assert done.returncode == 1
    assert "NV_WARN_NOTHING_TO_DO" in done.stderr
