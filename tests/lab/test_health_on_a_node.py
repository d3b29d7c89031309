"""The probes on a node with simulated GPUs: unhealthy within the deadline when broken, healthy again when mended."""

import json
import shlex
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import pytest

from gpuyard.handover.inventory import LAB_PCI_ROOT
from gpuyard.lab import agent
from gpuyard.lab.models import NodeState

from .conftest import PROJECT, Lab
from .test_gpu_node import UPDATE, install, name_repository, play

pytestmark = pytest.mark.lab
PROBES = "/usr/local/lib/gpuyard/health"
GPU = "GPU 0000:19:00.0: "
SECONDS = 15  # reliability's table of faults: F29
OF_GPUS = (
    *("check_gpu_count", "check_gpu_recovery_action", "check_ecc_errors", "check_remapped_rows", "check_pcie_link"),
    *("check_nvlink", "check_clocks_event_reasons", "check_gpu_temperature"),
)
ON_THE_BUS = ("check_gpu_count", "check_nvlink")


@dataclass
class Ward:
    lab: Lab
    node: NodeState

    def verdicts(self, *requests: dict[str, Any], seconds: int = SECONDS) -> dict[str, dict[str, Any]]:
        done = self.lab.on(self.node, f"python3 -B {PROBES} {shlex.quote(json.dumps(requests))} {seconds}")
        assert done.returncode in (0, 1), done.stderr
        return {verdict["check"]: verdict for verdict in json.loads(done.stdout)["checks"]}

    def unwell(self) -> dict[str, str]:
        where = {"pci_root": LAB_PCI_ROOT}
        asked = [{"check": check, **(where if check in ON_THE_BUS else {})} for check in OF_GPUS]
        found = self.verdicts(*asked)
        return {check: verdict["reason"] for check, verdict in found.items() if verdict["state"] != "Healthy"}

    def mark(self) -> str:
        return self.lab.said(self.node, f"python3 -B {PROBES} mark")

    def xids(self, since: str) -> dict[str, Any]:
        return self.verdicts({"check": "check_xid", "since": since})["check_xid"]

    def breaks(self, fault: str, *words: str) -> None:
        agent.fault_break(self.lab.ref, self.node.name, fault, None, 0, list(words), 0)

    def mends(self) -> None:
        agent.fault_mend(self.lab.ref, self.node.name, None)


@pytest.fixture(scope="module")
def ward(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Ward:
    lab.up()
    node = lab.gpu("t-health-0")
    name_repository(lab, node)
    done = play(lab, node, tmp_path_factory.mktemp("play"))
    assert "failed=0" in done, done
    lab.said(node, f"{UPDATE} && {install('580.126.20')} && modprobe -a nvidia nvidia_uvm")
    packed = subprocess.run(
        ["tar", "-C", PROJECT / "src/gpuyard/health", "--exclude=__pycache__", "-cz", "."],
        capture_output=True,
        check=True,
    )
    words = [*agent.login(lab.ref, node), f"mkdir -p {PROBES} && tar -xzC {PROBES}"]
    subprocess.run(words, input=packed.stdout, check=True, timeout=60)
    return Ward(lab, node)


@pytest.mark.parametrize(
    ("fault", "words", "checks", "says"),
    [
        ("ecc", [], {"check_ecc_errors"}, "1 sram uncorrectable ECC errors"),
        ("ecc", ["memory=dram", "count=7"], {"check_ecc_errors"}, "7 dram uncorrectable ECC errors"),
        ("remap-pending", [], {"check_remapped_rows"}, "remapped at the next reset"),
        ("remap-failure", [], {"check_remapped_rows"}, "return the GPU"),
        ("nvlink-down", ["link=4", "links=2"], {"check_nvlink"}, "NVLinks are inactive: 4, 5"),
        ("pcie-narrow", [], {"check_pcie_link"}, "8 of 16 lanes"),
        ("clocks-low", [], {"check_clocks_event_reasons"}, "hw_power_brake_slowdown"),
        ("clocks-low", ["reason=hw-thermal"], {"check_clocks_event_reasons"}, "hw_thermal_slowdown"),
        ("gpu-hot", [], {"check_clocks_event_reasons", "check_gpu_temperature"}, ""),
        ("recovery-action", ["action=1"], {"check_gpu_recovery_action"}, "asks for a reset"),
        ("recovery-action", ["action=4"], {"check_gpu_recovery_action"}, "drained and reset"),
        ("gpu-lost", [], set(OF_GPUS), ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value)[:20],
)
def test_a_fault_makes_the_node_unhealthy_until_it_is_mended(
    ward: Ward, fault: str, words: list[str], checks: set[str], says: str
) -> None:
    assert ward.unwell() == {}
    since = ward.mark()
    ward.breaks(fault, *words)
    began = time.monotonic()
    found = ward.unwell()
    took = time.monotonic() - began
    told = ward.xids(since)["found"]["xids"]
    ward.mends()
    print(f"{fault} {' '.join(words)}: {took:.1f} s; Xids {[(row['code'], row['class']) for row in told]}")
    assert set(found) == checks
    assert took < SECONDS
    for reason in found.values():
        assert says in reason
        assert GPU in reason or fault == "gpu-lost"
    assert ward.unwell() == {}


def test_a_gpu_that_makes_nvidia_smi_hang_is_told_in_time(ward: Ward) -> None:
    ward.breaks("nvml-hangs")
    began = time.monotonic()
    found = ward.verdicts({"check": "check_ecc_errors"}, {"check": "check_nvlink"}, seconds=3)
    took = time.monotonic() - began
    ward.mends()
    assert {verdict["reason"] for verdict in found.values()} == {"the probe gave no answer in 3 s"}
    assert took < SECONDS
    assert ward.unwell() == {}


@pytest.mark.parametrize(
    ("words", "does"),
    [
        (["code=13"], "APP"),
        (["code=119"], "RESET"),
        (["code=79", "times=3"], "REBOOT"),
        (["code=74"], "FABRIC"),
        (["code=64"], "RMA"),
        (["code=154"], "RESET"),
        (["code=999"], "QUARANTINE"),
        (["code=63"], "INFO"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_an_xid_is_told_from_the_mark_on(ward: Ward, words: list[str], does: str) -> None:
    since = ward.mark()
    assert ward.xids(since)["reason"] == "no Xid since the mark"
    ward.breaks("xid", *words)
    began = time.monotonic()
    verdict = ward.xids(since)
    took = time.monotonic() - began
    ward.mends()
    [row] = verdict["found"]["xids"]
    assert (row["gpu"], f"code={row['code']}", row["class"]) == ("0000:19:00.0", words[0], does)
    assert verdict["state"] == ("Healthy" if does == "INFO" else "Unhealthy")
    assert took < 5, "reliability's table of faults: F14, F27"
    assert ward.xids(since)["state"] == verdict["state"], "what was logged stays logged"
    assert ward.xids(ward.mark())["state"] == "Healthy"


@pytest.mark.parametrize("action", ["2", "3", "5", "99"])
def test_an_action_that_this_nvidia_smi_does_not_know_is_seen_in_the_kernels_log(ward: Ward, action: str) -> None:
    since = ward.mark()
    ward.breaks("recovery-action", f"action={action}")
    verdict = ward.xids(since)
    ward.mends()
    assert verdict["state"] == "Unhealthy"
    assert {row["code"] for row in verdict["found"]["xids"]} == {154}


def test_the_mark_holds_over_a_new_journal_file_and_a_reboot(ward: Ward) -> None:
    since = ward.mark()
    ward.breaks("xid", "code=119")
    ward.mends()
    ward.lab.said(ward.node, "journalctl --rotate && systemctl restart systemd-journald")
    assert [row["code"] for row in ward.xids(since)["found"]["xids"]] == [119]
    ward.breaks("power-cut")
    ward.mends()
    ward.breaks("xid", "code=79")
    ward.mends()
    verdict = ward.xids(since)
    assert since.split(";")[2] != ward.mark().split(";")[2], "the node has booted again"
    assert [row["code"] for row in verdict["found"]["xids"]] == [119, 79], verdict


def test_a_journal_without_the_mark_is_no_proof(ward: Ward) -> None:
    since = ward.mark()
    ward.lab.said(
        ward.node, "journalctl --rotate && rm -f /var/log/journal/*/*@* && systemctl restart systemd-journald"
    )
    verdict = ward.xids(since)
    assert verdict["state"] == "Unhealthy"
    assert "does not reach back to the mark" in verdict["reason"]
    assert ward.xids(ward.mark())["state"] == "Healthy"
