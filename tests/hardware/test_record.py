"""A record of a host's GPU layer: what it must not say, and how two are held against each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hardware import record

UUID = "GPU-64f7e2f8-8a5f-5703-97d6-0d0606f8094c"
SMI = f"""<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>580.126.20</driver_version>
  <gpu id="00000000:19:00.0">
    <product_name>NVIDIA L40S</product_name>
    <serial>1650000000017</serial>
    <uuid>{UUID}</uuid>
    <platformInfo><module_serial>ABC-9</module_serial><peer_guid>0x1122334455667788</peer_guid></platformInfo>
  </gpu>
</nvidia_smi_log>
"""
HOST = {
    "nvidia-smi -q -x": SMI,
    "nvidia-smi -L": f"GPU 0: NVIDIA L40S (UUID: {UUID})\n",
    "/proc/driver/nvidia/gpus/0000:19:00.0/information": f"Model: \t L40S\nGPU UUID: \t {UUID}\nSerial Number : 42\n",
    "/proc/devices": "Character devices:\n  1 mem\n195 nvidia\n510 nvidia-uvm\n",
    "lsmod": "Module Size Used by\nnvidia_uvm 2076672 2\nnvidia 14381056 3 nvidia_uvm\nxfs 1 0\n",
    "engine log": "INFO gpu-7.example.org 10.2.3.4:8000 mac 02:42:ac:11:00:02 for /home/alice/m at 127.0.0.1\n",
    "nvml": "driver 580.126.20, NVML 13.580.126.20\n0 Name: NVIDIA L40S\n0 RemappedRows: NVMLError_NotSupported: no",
}
WHO = {"gpu-7", "gpu-7.example.org"}


def test_a_record_does_not_say_whose_host_it_is() -> None:
    told = json.dumps(record.redacted(HOST, WHO))
    for secret in (
        UUID,
        "1650000000017",
        "ABC-9",
        "1122334455667788",
        "gpu-7",
        "10.2.3.4",
        "02:42:ac",
        "alice",
        ": 42",
    ):
        assert secret.lower() not in told.lower(), secret
    for useful in ("NVIDIA L40S", "580.126.20", "13.580.126.20", "00000000:19:00.0", "127.0.0.1", "host"):
        assert useful in told, useful


def test_what_belongs_together_still_does() -> None:
    told = record.redacted(HOST, WHO)
    assert "<uuid>uuid-1</uuid>" in told["nvidia-smi -q -x"]
    assert told["nvidia-smi -L"] == "GPU 0: NVIDIA L40S (UUID: uuid-1)\n"
    two = record.redacted({"a": UUID, "b": UUID.replace("64f7e2f8", "00000000"), "c": UUID}, set())
    assert two == {"a": "uuid-1", "b": "uuid-2", "c": "uuid-1"}


def test_redacting_twice_changes_nothing() -> None:
    once = record.redacted(HOST, WHO)
    assert record.redacted(once, WHO) == once


def test_two_hosts_with_other_values_are_alike() -> None:
    other = {
        place.replace("0000:19", "0000:ab"): text.replace("580.126.20", "580.105.08").replace("L40S", "H100")
        for place, text in HOST.items()
    }
    assert record.difference(HOST, other) == {}


@pytest.mark.parametrize(
    ("place", "old", "new", "only"),
    [
        ("nvidia-smi -q -x", "<product_name>NVIDIA L40S</product_name>", "", "/nvidia_smi_log/gpu/product_name"),
        ("/proc/devices", "510 nvidia-uvm\n", "", "nvidia-uvm"),
        ("lsmod", "nvidia_uvm 2076672 2\n", "", "nvidia_uvm"),
        ("nvml", "0 Name: NVIDIA L40S", "0 Name: NVMLError_Unknown", "Name"),
    ],
)
def test_a_field_that_one_of_them_lacks_is_named(place: str, old: str, new: str, only: str) -> None:
    found = record.difference(HOST, {**HOST, place: HOST[place].replace(old, new)})
    assert found == {place: {"only in the first": [only], "only in the second": []}}


def test_a_surface_that_did_not_answer_has_no_fields() -> None:
    for text in ("no answer: nvidia-smi is not there", "garbage", f"{SMI}\n(exit status 9)"):
        assert record.fields("nvidia-smi -q -x", text) == set()


def test_records_are_compared_by_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(json.dumps(HOST))
    (tmp_path / "b").write_text(json.dumps({**HOST, "lsmod": ""}))
    command = [sys.executable, record.__file__, "compare", str(tmp_path / "a")]
    same = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=False)
    assert (same.returncode, json.loads(same.stdout)) == (0, {})
    other = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert list(json.loads(other.stdout)) == ["lsmod"]


def test_a_host_without_a_gpu_has_a_record_too() -> None:
    taken = record.take()
    assert set(record.COMMANDS) | {"nvml", "/proc/devices"} <= set(taken)
