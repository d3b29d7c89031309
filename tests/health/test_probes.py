"""Probes: what a node showed, and the verdict on it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpuyard.health import driver_version, fabric_manager, gpu_count, model_ready, service_active, tools
from gpuyard.health.verdict import HEALTHY, INITIALIZING, UNHEALTHY, Verdict, worst

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.20  Release Build  (dvs-builder@U22-I3-B15)\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14+deb12u1)"
)
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.309.01  Tue Feb 10 10:25:10 UTC 2026\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)"
)


# --- the driver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "version", "modules"),
    [
        (OPEN, "580.126.20", "open"),
        (PROPRIETARY, "535.309.01", "proprietary"),
        (None, "none", "no"),
        ("", "unreadable", "proprietary"),
        ("NVRM version: something else 1.2.3", "unreadable", "proprietary"),
    ],
)
def test_the_loaded_driver_is_read_from_what_the_module_says(text: str | None, version: str, modules: str) -> None:
    assert driver_version.loaded_version(text) == version
    assert driver_version.loaded_modules(text) == modules


@pytest.mark.parametrize("version", ["580.126.20-1", "1:580.126.20-1", "580.126.20-1ubuntu1", "580.126.20"])
def test_a_package_version_is_compared_without_epoch_and_revision(version: str) -> None:
    assert driver_version.upstream(version) == "580.126.20"


def four(**other: str) -> dict[str, str]:
    return {**dict.fromkeys(("package", "file", "loaded", "userland"), "580.126.20"), **other}


def test_a_driver_that_is_everywhere_the_locked_one_is_healthy() -> None:
    assert driver_version.judge("580.126.20", "open", four(), "open").state == HEALTHY


@pytest.mark.parametrize("place", ["package", "file", "loaded", "userland"])
def test_a_driver_that_differs_in_one_place_is_unhealthy_and_the_place_is_named(place: str) -> None:
    verdict = driver_version.judge("580.126.20", "open", four(**{place: "580.105.08"}), "open")
    assert verdict.state == UNHEALTHY
    assert f"{place}: 580.105.08" in verdict.reason


def test_the_locked_version_with_the_other_kernel_modules_is_unhealthy() -> None:
    verdict = driver_version.judge("580.126.20", "open", four(), "proprietary")
    assert verdict.state == UNHEALTHY
    assert "proprietary kernel modules" in verdict.reason


def test_a_node_without_any_driver_is_unhealthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(driver_version, "LOADED", tmp_path / "none")
    verdict = driver_version.probe("580.126.20", "open", "nvidia-kernel-open-dkms")
    assert verdict.state == UNHEALTHY
    assert verdict.found["loaded"] == "none"
    assert verdict.found["userland"] == "nvidia-smi is not installed"


# --- GPUs ----------------------------------------------------------------------------------------------------------

BUS = ["0000:19:00.0", "0000:3b:00.0"]
SMI = ["00000000:19:00.0", "00000000:3B:00.0"]


@pytest.mark.parametrize(
    ("expected", "on_bus", "answering", "state", "words"),
    [
        (0, BUS, SMI, HEALTHY, "2 GPUs answer"),
        (2, BUS, SMI, HEALTHY, "2 GPUs answer"),
        (8, BUS, SMI, UNHEALTHY, "8 GPUs were promised, 2 are there"),
        (2, BUS, SMI[:1], UNHEALTHY, "1 of 2 GPUs on the bus do not answer: 0000:3b:00.0"),
        (0, BUS[:1], SMI, UNHEALTHY, "2 GPUs answer, 1 are on the bus"),
        (0, [], [], UNHEALTHY, "there is no GPU"),
    ],
)
def test_gpus_are_counted(expected: int, on_bus: list[str], answering: list[str], state: str, words: str) -> None:
    verdict = gpu_count.judge(expected, on_bus, answering)
    assert (verdict.state, verdict.reason) == (state, words)


def device(root: Path, address: str, vendor: str, kind: str) -> None:
    (root / address).mkdir(parents=True)
    (root / address / "vendor").write_text(vendor + "\n")
    (root / address / "class").write_text(kind + "\n")


def test_only_nvidias_devices_of_the_class_are_seen_on_the_bus(tmp_path: Path) -> None:
    device(tmp_path, "0000:19:00.0", "0x10de", "0x030200")
    device(tmp_path, "0000:05:00.0", "0x10de", "0x068000")
    device(tmp_path, "0000:00:01.0", "0x8086", "0x030000")
    (tmp_path / "0000:99:00.0").mkdir()
    assert tools.pci_devices(str(tmp_path), tools.GPU_CLASSES) == ["0000:19:00.0"]
    assert tools.pci_devices(str(tmp_path), tools.NVSWITCH_CLASSES) == ["0000:05:00.0"]
    assert tools.pci_devices(str(tmp_path / "nowhere"), tools.GPU_CLASSES) == []


# --- services ------------------------------------------------------------------------------------------------------


def shown(**other: str) -> dict[str, str]:
    usual = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled"}
    return {**usual, "Result": "success", "NRestarts": "0", **other}


@pytest.mark.parametrize(
    ("properties", "state", "words"),
    [
        (shown(), HEALTHY, "is active (running)"),
        (shown(ActiveState="activating", SubState="start-post"), INITIALIZING, "activating"),
        (shown(ActiveState="failed", SubState="failed", Result="exit-code"), UNHEALTHY, "result exit-code"),
        (shown(ActiveState="inactive", SubState="dead"), UNHEALTHY, "inactive (dead)"),
        (shown(UnitFileState="disabled"), UNHEALTHY, "gone after a reboot"),
        (shown(LoadState="not-found", ActiveState="inactive"), UNHEALTHY, "is not there (not-found)"),
        ({}, UNHEALTHY, "is not there (unknown)"),
    ],
)
def test_a_service_is_judged_by_what_systemd_shows(properties: dict[str, str], state: str, words: str) -> None:
    verdict = service_active.judge("x.service", properties)
    assert verdict.state == state
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("nvswitches", "properties", "state"),
    [
        (4, shown(), HEALTHY),
        (4, shown(LoadState="not-found", ActiveState="inactive"), UNHEALTHY),
        (4, shown(ActiveState="failed"), UNHEALTHY),
        (0, shown(LoadState="not-found", ActiveState="inactive"), HEALTHY),
        (0, shown(), UNHEALTHY),
        (0, shown(ActiveState="inactive"), UNHEALTHY),
    ],
)
def test_a_fabric_manager_runs_with_an_nvswitch_and_only_then(
    nvswitches: int, properties: dict[str, str], state: str
) -> None:
    service = service_active.judge(fabric_manager.UNIT, properties)
    assert fabric_manager.judge(nvswitches, service).state == state


# --- engines -------------------------------------------------------------------------------------------------------


class Engine(ThreadingHTTPServer):
    """Speaks as an engine does; what it says is set by the test."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EngineHandler)
        self.status = 200
        self.models = ["m"]
        self.tokens = 1
        self.body: bytes | None = None
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class EngineHandler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self.answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"choices": [{"text": "x"}], "usage": {"completion_tokens": self.server.tokens}})

    def answer(self, body: dict[str, Any]) -> None:
        self.server.seen.append(f"{self.path} {self.headers['Authorization']}")
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body if self.server.body is not None else json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[Engine]:
    server = Engine()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def key(tmp_path: Path) -> str:
    file = tmp_path / "key"
    file.write_text("a-secret\n")
    return str(file)


def test_an_engine_that_lists_its_model_and_generates_is_healthy(engine: Engine, key: str) -> None:
    assert model_ready.probe(engine.url, "m", key).state == HEALTHY
    assert engine.seen == ["/v1/models Bearer a-secret", "/v1/completions Bearer a-secret"]


def test_an_engine_without_the_model_is_unhealthy(engine: Engine, key: str) -> None:
    engine.models = ["other"]
    verdict = model_ready.probe(engine.url, "m", key)
    assert (verdict.state, verdict.reason) == (UNHEALTHY, "m is not listed; other is")


def test_an_engine_that_generates_nothing_is_unhealthy(engine: Engine, key: str) -> None:
    engine.tokens = 0
    assert model_ready.probe(engine.url, "m", key).state == UNHEALTHY


@pytest.mark.parametrize(("status", "state"), [(503, INITIALIZING), (401, UNHEALTHY), (500, UNHEALTHY)])
def test_an_engine_that_refuses_is_not_ready(engine: Engine, key: str, status: int, state: str) -> None:
    engine.status = status
    verdict = model_ready.probe(engine.url, "m", key)
    assert verdict.state == state
    assert str(status) in verdict.reason


def test_an_engine_that_talks_nonsense_is_unhealthy(engine: Engine, key: str) -> None:
    engine.body = b"<html>"
    assert model_ready.probe(engine.url, "m", key).state == UNHEALTHY


def test_an_engine_that_is_not_there_is_unhealthy(engine: Engine, key: str) -> None:
    url = engine.url
    engine.server_close()
    verdict = model_ready.probe(url, "m", key)
    assert verdict.state == UNHEALTHY
    assert "does not answer" in verdict.reason


def test_a_key_that_cannot_be_read_is_told_without_asking(engine: Engine, tmp_path: Path) -> None:
    verdict = model_ready.probe(engine.url, "m", str(tmp_path / "none"))
    assert verdict.state == UNHEALTHY
    assert engine.seen == []


def test_no_verdict_on_an_engine_holds_its_key(engine: Engine, key: str) -> None:
    for status in (200, 401, 503):
        engine.status = status
        assert "a-secret" not in model_ready.probe(engine.url, "m", key).as_json()


# --- verdicts ------------------------------------------------------------------------------------------------------


def test_a_node_is_as_well_as_the_worst_that_was_found() -> None:
    assert worst(["Healthy", "Unhealthy", "Initializing"]) == UNHEALTHY
    assert worst(["Healthy", "Degraded"]) == "Degraded"
    assert worst(["Healthy"]) == HEALTHY


def test_of_nothing_nothing_is_known() -> None:
    assert worst([]) == UNHEALTHY


def test_a_verdict_is_one_line_of_json() -> None:
    text = Verdict("check_x", HEALTHY, "two\nlines", {"a": 1}).as_json()
    assert "\n" not in text
    assert json.loads(text) == {"check": "check_x", "state": "Healthy", "reason": "two\nlines", "found": {"a": 1}}
