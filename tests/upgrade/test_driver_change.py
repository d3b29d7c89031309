"""What is refused before a driver is changed: each rule by its facts, and the rim that finds them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.module_utils import readiness
from plugins.module_utils.dpkg import parse_held
from plugins.module_utils.driver_change import findings
from plugins.modules import driver_change

ASKED: dict[str, Any] = {
    "node": "a-chat-0",
    "target": {
        "version": "590.44.01",
        "packages": {"libnvidia-ml1": "590.44.01-1", "nvidia-driver-pinning-590": "590-1"},
    },
    "previous": {
        "version": "580.126.20",
        "packages": {"libnvidia-ml1": "580.126.20-1", "nvidia-driver-pinning-580": "580-1"},
    },
    "needs": {"vllm 0.32.0": "580.65.06"},
    "users": ["vllm@*.service", "nvidia-persistenced.service"],
    "free_mib": {"/": 512, "/boot": 256},
}
WELL: dict[str, Any] = {
    "container": False,
    "kernel": "6.1.0-30-amd64",
    "lock": None,
    "unfinished": {},
    # The hold of its own last install.
    "held": ["libnvidia-ml1", "nvidia-driver-pinning-580", "grub-pc"],
    "read_only": [],
    "free_mib": {"/": 512, "/boot": 256},
    "gpu_users": [
        {"pid": 7, "command": "vllm", "unit": "vllm@tiny.service"},
        {"pid": 8, "command": "nvidia-persiste", "unit": "nvidia-persistenced.service"},
    ],
    "headers": True,
    "headers_offered": False,
    "secure_boot": False,
    "key": "",
    "key_enrolled": False,
}
STRANGER = {"pid": 9, "command": "dcgm-exporter", "unit": "nvidia-dcgm-exporter.service"}
LOCK = {"path": "/var/lib/dpkg/lock-frontend", "pid": 9, "command": "unattended-upgr", "waited": 300}


def refused(asked: dict[str, Any] | None = None, **facts: Any) -> list[str]:
    return findings({**ASKED, **(asked or {})}, {**WELL, **facts})


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"headers": False, "headers_offered": True},
        {"secure_boot": True, "key": "/var/lib/dkms/mok.pub", "key_enrolled": True},
        {"container": True, "headers": False, "secure_boot": True, "free_mib": {"/": 512}},
        {"gpu_users": []},
    ],
)
def test_a_node_that_is_well_is_not_refused(facts: dict[str, Any]) -> None:
    assert refused(**facts) == []


@pytest.mark.parametrize(
    ("facts", "rule", "words"),
    [
        ({"unfinished": {"grub-pc": "half-configured"}}, "APT-DPKG-BROKEN", "grub-pc (half-configured)"),
        ({"held": ["nvidia-driver-pinning-590"]}, "APT-HELD", "apt-mark unhold nvidia-driver-pinning-590"),
        ({"lock": LOCK}, "APT-LOCKED", "unattended-upgr (pid 9) holds /var/lib/dpkg/lock-frontend for 300 s"),
        ({"free_mib": {"/": 511, "/boot": 256}}, "DRIVER-DISK", "512 MiB are asked for below / of a-chat-0"),
        ({"free_mib": {"/": 512, "/boot": 255}}, "DRIVER-DISK", "255 MiB are free"),
        ({"read_only": ["/etc", "/var"]}, "APT-READ-ONLY", "the file system of /etc, /var is mounted read-only"),
        ({"headers": False}, "DRIVER-HEADERS", "linux-headers-6.1.0-30-amd64"),
        ({"secure_boot": True, "key": "/var/lib/dkms/mok.pub"}, "DRIVER-SECURE-BOOT", "(/var/lib/dkms/mok.pub)"),
        ({"secure_boot": True}, "DRIVER-SECURE-BOOT", "none is there"),
        ({"gpu_users": [STRANGER]}, "DRIVER-BUSY", "dcgm-exporter (pid 9, nvidia-dcgm-exporter.service)"),
        ({"gpu_users": [{**STRANGER, "unit": ""}]}, "DRIVER-BUSY", "dcgm-exporter (pid 9, no unit)"),
    ],
)
def test_each_fact_is_refused_by_its_rule(facts: dict[str, Any], rule: str, words: str) -> None:
    (found,) = refused(**facts)
    assert found.startswith(f"{rule}: ")
    assert words in found
    assert "a-chat-0" in found


@pytest.mark.parametrize(
    ("needs", "who"),
    [("590.44.02", {"target is 590.44.01", "way back is 580.126.20"}), ("590.44.01", {"way back is 580.126.20"})],
)
def test_an_engine_is_named_that_the_target_or_the_way_back_is_too_old_for(needs: str, who: set[str]) -> None:
    found = refused({"needs": {"vllm 0.40.0": needs}})
    assert all(
        words.startswith(f"DRIVER-ENGINE: vllm 0.40.0 on a-chat-0 needs driver {needs} or newer") for words in found
    )
    assert {name for name in ("target is 590.44.01", "way back is 580.126.20") if any(name in w for w in found)} == who


def test_versions_are_compared_as_numbers() -> None:
    assert refused({"needs": {"vllm": "580.99.1"}, "target": ASKED["previous"]}) == []


def test_everything_is_told_at_once() -> None:
    found = refused(unfinished={"a": "unpacked"}, headers=False, gpu_users=[STRANGER])
    assert [words.split(":")[0] for words in found] == ["APT-DPKG-BROKEN", "DRIVER-HEADERS", "DRIVER-BUSY"]


# --- the rim ---


def test_a_hold_counts_whether_the_package_is_there_or_not() -> None:
    text = "a\tamd64\t1\thold\tinstalled\nb\tamd64\t\thold\tnot-installed\nc\tamd64\t1\tinstall\tinstalled\n"
    assert parse_held(text) == {"a", "b"}


def test_the_holder_of_a_lock_is_named_after_the_deadline_and_asking_takes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    assert readiness.wait_for_locks(0, (str(path), str(tmp_path / "none"))) is None
    hold = (
        "import fcntl, sys\nf = open(sys.argv[1], 'r+')\nfcntl.lockf(f, fcntl.LOCK_EX)\nprint(1, flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdout.readline()
        began = time.monotonic()
        found = readiness.wait_for_locks(1, (str(path),))
        assert found and (found["pid"], found["path"], found["waited"]) == (holder.pid, str(path), 1)
        assert found["command"].startswith("python")
        assert time.monotonic() - began >= 1
        holder.communicate("\n")
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_process_with_an_open_device_is_found_with_its_unit(tmp_path: Path) -> None:
    for pid, target, cgroup in (
        (10, "/dev/nvidia0", "0::/system.slice/system-vllm.slice/vllm@tiny.service"),
        (11, "/dev/nvidiactl", "0::/user.slice/user-0.slice/session-3.scope"),
        (12, "/dev/null", "0::/system.slice/ssh.service"),
    ):
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/fd/3").symlink_to(target)
        (tmp_path / f"proc/{pid}/cgroup").write_text(cgroup + "\n")
        (tmp_path / f"proc/{pid}/comm").write_text(f"p{pid}\n")
    assert driver_change.gpu_users(tmp_path) == {
        10: {"pid": 10, "command": "p10", "unit": "vllm@tiny.service"},
        11: {"pid": 11, "command": "p11", "unit": "session-3.scope"},
    }


def test_only_who_is_there_at_both_looks_uses_a_gpu() -> None:
    looks = iter([{1: {"pid": 1}, 2: {"pid": 2}}, {2: {"pid": 2}, 3: {"pid": 3}}])
    assert driver_change.lasting(lambda: next(looks), lambda: None) == [{"pid": 2}]


@pytest.mark.parametrize(
    ("value", "on"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\0", False), (b"", False), (None, False)]
)
def test_secure_boot_is_what_the_firmware_says(tmp_path: Path, value: bytes | None, on: bool) -> None:
    if value is not None:
        file = tmp_path / readiness.SECURE_BOOT
        file.parent.mkdir(parents=True)
        file.write_bytes(value)
    assert readiness.secure_boot(tmp_path) is on


def test_a_folder_that_is_not_there_is_measured_where_it_would_be(tmp_path: Path) -> None:
    assert readiness.free_mib("/boot/efi", tmp_path) == readiness.free_mib("/", tmp_path) > 0


def test_a_folder_is_read_only_where_its_file_system_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    flags = {tmp_path: 0, tmp_path / "etc": os.ST_RDONLY | os.ST_NOSUID}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags[path]))
    assert readiness.read_only(["/etc", "/etc/apt", "/usr"], tmp_path) == ["/etc", "/etc/apt"]
