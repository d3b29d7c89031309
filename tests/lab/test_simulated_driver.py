"""The user side of the driver over a folder that plays the node: the real nvidia-smi and the simulated daemons."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpuyard.health import driver_version, gpu_count, tools
from gpuyard.lab.packages import recipes

from .simulated_node import VERSION, Node, smi


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


def test_a_control_device_that_is_not_there_or_not_allowed_is_an_unknown_error(ready: Node) -> None:
    (ready.root / "dev/nvidiactl").unlink()
    done = ready.smi()
    assert done.returncode == 255
    assert "Failed to initialize NVML: Unknown Error" in done.stdout


def test_without_a_gpu_it_ends_with_6(ready: Node) -> None:
    ready.plug(0)
    assert ready.smi().returncode == 6


def test_a_gpu_that_fell_off_the_bus_is_named_and_ends_it_with_15(ready: Node) -> None:
    ready.patch(gpus={"1": {"lost": True}})
    done = ready.smi()
    assert done.returncode == 15
    assert "Unable to determine the device handle for GPU1: GPU is lost.  Reboot the system" in done.stdout


def test_the_probes_hear_what_nvidia_smi_says(
    ready: Node, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("bin")
    shutil.copy(smi(), folder / "nvidia-smi")
    for name, value in {**ready.environment(), "PATH": f"{folder}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    bus = str(ready.root / "var/lib/gpuyard-lab/pci")
    assert gpu_count.probe(2, bus).found == {"expected": 2, "on_bus": 2, "answering": 2, "silent": []}
    assert driver_version._userland() == VERSION
    ready.patch(gpus={"0": {"init_failed": True}})
    verdict = gpu_count.probe(2, bus)
    assert (verdict.state, verdict.found["silent"]) == ("Unhealthy", ["0000:19:00.0"])
    ready.patch(gpus={"1": {"lost": True}})
    assert "GPU is lost" in gpu_count.probe(2, bus).reason
    monkeypatch.setattr(tools, "DEADLINE_SECONDS", 1)
    monkeypatch.setattr(tools, "HUNG", {})
    ready.inject(nvmlDeviceGetHandleByIndex="hang")
    assert "did not answer in 1 s" in gpu_count.probe(2, bus).reason


@pytest.mark.parametrize("program", ["nvidia-persistenced", "nv-fabricmanager"])
@pytest.mark.parametrize("loaded", [None, "580.105.08"])
def test_a_daemon_refuses_a_driver_that_is_not_its_own(node: Node, program: str, loaded: str | None) -> None:
    node.plug(8)
    if loaded:
        node.load(loaded)
    done = node.run(program)
    assert done.returncode == 1
    assert (loaded or "") in done.stderr


def test_the_fabric_manager_has_nothing_to_do_without_a_switch(ready: Node) -> None:
    done = ready.run("nv-fabricmanager")
    assert done.returncode == 1
    assert "NV_WARN_NOTHING_TO_DO" in done.stderr


def test_what_the_daemons_do_is_seen_through_nvml_while_it_lasts(ready: Node) -> None:
    ready.plug(8)
    ready.load(VERSION)

    def seen() -> list[str]:
        words = ("--query-gpu=persistence_mode", "--format=csv,noheader", "-i", "0")
        fabric = next(line for line in ready.smi("-q", "-i", "0").stdout.split("Fabric\n")[1].splitlines())
        return [ready.smi(*words).stdout.strip(), fabric.split(": ")[1]]

    assert seen() == ["Disabled", "In Progress"]
    running = [
        subprocess.Popen([sys.executable, ready.root / "usr/bin" / name], env=ready.environment())
        for name in ("nvidia-persistenced", "nv-fabricmanager")
    ]
    try:
        deadline = time.monotonic() + 20
        while seen() != ["Enabled", "Completed"]:
            assert time.monotonic() < deadline, seen()
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
            process.wait(10)
    assert seen() == ["Disabled", "Completed"], "the switches stay configured without their manager"


def test_each_version_of_the_library_is_one_file_under_its_own_name() -> None:
    packages = {package.version: package for package in recipes.packages() if package.name == "libnvidia-ml1"}
    assert len(packages) == 4
    for version, package in packages.items():
        upstream = version.removesuffix("-1")
        assert package.built == {f"{recipes.LIBRARIES}/libnvidia-ml.so.{upstream}": "libnvidia-ml.so"}
        assert package.links == {f"{recipes.LIBRARIES}/libnvidia-ml.so.1": f"libnvidia-ml.so.{upstream}"}
    assert json.dumps([package.programs for package in packages.values()]) == "[{}, {}, {}, {}]"
