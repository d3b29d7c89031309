"""The simulated NVML, asked by nvidia-ml-py and by the real nvidia-smi, against the state file it reads."""

import ctypes
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpuyard.lab import nvml as folder

from .simulated_node import VERSION, Node, boards, library, on, use_library

RECORDED = json.loads((Path(__file__).parent / "recorded/nvidia_smi.json").read_text())
CODES = [*range(1, 31), 999]

# Each with a value of its own, so that two that were exchanged are seen.
COUNTERS = {
    kind: {"volatile": {"sram": base + 1, "dram": base + 2}, "aggregate": {"sram": base + 3, "dram": base + 4}}
    for kind, base in (("corrected", 10), ("uncorrected", 20))
}
UNWELL: dict[str, Any] = {
    "temperature_c": 77,
    "temperature_memory_c": 88,
    "power_draw_w": 61.5,
    "power_w": 65,
    "utilization_gpu": 93,
    "utilization_memory": 41,
    "memory_used_mib": 12345,
    "clocks": {"graphics": 1111, "sm": 1112, "memory": 1113, "video": 1114},
    "clocks_event_reasons": 0x4 | 0x40,
    "ecc": {**COUNTERS, "sram_threshold_exceeded": True},
    "remapped_rows": {"correctable": 3, "uncorrectable": 5, "pending": True, "failure": True},
    "retired_pages": {"single_bit": 6, "double_bit": 7, "pending": True},
    "pcie": {"gen": 1, "width": 8, "replays": 99},
    "recovery_action": 4,
}
LINKS = {"3": {"state": "inactive", "crc_errors": 31, "replays": 32, "recoveries": 33}}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return on(tmp_path, "H100-SXM5-80GB")


def sick(node: Node) -> None:
    """The third GPU has something of everything, the seven others are well."""
    gpu = UNWELL if node.state.get("gpu.2.nvlink.0.state") is None else {**UNWELL, "nvlink": LINKS}
    node.patch(gpus={"2": gpu})


# --- nvidia-ml-py: every key of the state file ---------------------------------------------------------------------


def field(nv: Any, gpu: Any, number: int, scope: int = 0) -> int:
    found = nv.nvmlDeviceGetFieldValues(gpu, [(number, scope)])[0]
    if found.nvmlReturn:
        raise nv.NVMLError(found.nvmlReturn)
    name = {nv.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal", nv.NVML_VALUE_TYPE_SIGNED_INT: "siVal"}
    return getattr(found.value, name.get(found.valueType, "ullVal"))


def counter(nv: Any, gpu: Any, kind: str, since: str, where: str) -> int:
    place = {"sram": nv.NVML_MEMORY_LOCATION_SRAM, "dram": nv.NVML_MEMORY_LOCATION_DRAM}[where]
    return nv.nvmlDeviceGetMemoryErrorCounter(gpu, int(kind == "uncorrected"), int(since == "aggregate"), place)


def retired(nv: Any, gpu: Any, which: int) -> int:
    """-1 where the board has no such pages."""
    try:
        return [
            lambda: len(nv.nvmlDeviceGetRetiredPages(gpu, 0)),
            lambda: len(nv.nvmlDeviceGetRetiredPages(gpu, 1)),
            lambda: nv.nvmlDeviceGetRetiredPagesPendingStatus(gpu),
        ][which]()
    except nv.NVMLError_NotSupported:
        return -1


def rows(nv: Any, gpu: Any, which: int) -> int:
    try:
        assert list(nv.nvmlDeviceGetRemappedRows(gpu)) == [field(nv, gpu, 142 + n) for n in range(4)]
        return nv.nvmlDeviceGetRemappedRows(gpu)[which]
    except nv.NVMLError_NotSupported:
        return -1


CLOCK = {"graphics": 0, "sm": 1, "memory": 2, "video": 3}
MIB = 1 << 20
Reader = Callable[..., object]
# What reads a key, by its pattern; groups of the pattern are given as words. None: no question of NVML shows this key.
READERS: Mapping[str, Reader | None] = {
    r"bdf": lambda nv, gpu: nv.nvmlDeviceGetPciInfo(gpu).busId.lower()[4:],
    r"device": lambda nv, gpu: f"0x{nv.nvmlDeviceGetPciInfo(gpu).pciDeviceId >> 16:04x}",
    r"subsystem": lambda nv, gpu: f"0x{nv.nvmlDeviceGetPciInfo(gpu).pciSubSystemId:08x}",
    r"class": None,
    r"name": lambda nv, gpu: nv.nvmlDeviceGetName(gpu),
    r"uuid": lambda nv, gpu: nv.nvmlDeviceGetUUID(gpu),
    r"serial": lambda nv, gpu: nv.nvmlDeviceGetSerial(gpu),
    r"vbios": lambda nv, gpu: nv.nvmlDeviceGetVbiosVersion(gpu),
    r"part_number": lambda nv, gpu: nv.nvmlDeviceGetBoardPartNumber(gpu),
    r"brand": lambda nv, gpu: nv.nvmlDeviceGetBrand(gpu),
    r"architecture": lambda nv, gpu: nv.nvmlDeviceGetArchitecture(gpu),
    r"compute": lambda nv, gpu: ".".join(map(str, nv.nvmlDeviceGetCudaComputeCapability(gpu))),
    r"minor": lambda nv, gpu: nv.nvmlDeviceGetMinorNumber(gpu),
    r"memory_mib": lambda nv, gpu: nv.nvmlDeviceGetMemoryInfo(gpu, version=nv.nvmlMemory_v2).total // MIB,
    r"memory_used_mib": lambda nv, gpu: nv.nvmlDeviceGetMemoryInfo(gpu).used // MIB,
    r"bar1_mib": lambda nv, gpu: nv.nvmlDeviceGetBAR1MemoryInfo(gpu).bar1Total // MIB,
    r"power_w": lambda nv, gpu: nv.nvmlDeviceGetPowerManagementLimit(gpu) / 1000,
    r"power_draw_w": lambda nv, gpu: nv.nvmlDeviceGetPowerUsage(gpu) / 1000,
    r"power_min_w": lambda nv, gpu: nv.nvmlDeviceGetPowerManagementLimitConstraints(gpu)[0] / 1000,
    r"power_max_w": lambda nv, gpu: nv.nvmlDeviceGetPowerManagementLimitConstraints(gpu)[1] / 1000,
    r"temperature_c": lambda nv, gpu: nv.nvmlDeviceGetTemperature(gpu, 0),
    r"temperature_memory_c": lambda nv, gpu: field(nv, gpu, 82),
    r"temperature_shutdown_c": lambda nv, gpu: nv.nvmlDeviceGetTemperatureThreshold(gpu, 0),
    r"temperature_slowdown_c": lambda nv, gpu: nv.nvmlDeviceGetTemperatureThreshold(gpu, 1),
    r"temperature_memory_max_c": lambda nv, gpu: nv.nvmlDeviceGetTemperatureThreshold(gpu, 2),
    r"temperature_max_c": lambda nv, gpu: nv.nvmlDeviceGetTemperatureThreshold(gpu, 3),
    # What it is while idle or under load is seen when it is; test_temperature_power_and_clocks_move_with_the_load.
    r"(?:temperature|power)_(?:idle|load)_[cw]|clocks_idle\..*|pstate_idle": None,
    r"utilization_gpu": lambda nv, gpu: nv.nvmlDeviceGetUtilizationRates(gpu).gpu,
    r"utilization_memory": lambda nv, gpu: nv.nvmlDeviceGetUtilizationRates(gpu).memory,
    r"clocks\.(\w+)": lambda nv, gpu, clock: nv.nvmlDeviceGetClockInfo(gpu, CLOCK[clock]),
    r"clocks_max\.(\w+)": lambda nv, gpu, clock: nv.nvmlDeviceGetMaxClockInfo(gpu, CLOCK[clock]),
    r"clocks_event_reasons": lambda nv, gpu: nv.nvmlDeviceGetCurrentClocksEventReasons(gpu),
    r"ecc\.enabled": lambda nv, gpu: nv.nvmlDeviceGetEccMode(gpu)[0],
    r"ecc\.(corrected|uncorrected)\.(\w+)\.(\w+)": counter,
    r"ecc\.sram_threshold_exceeded": lambda nv, gpu: sram_status(nv, gpu).bThresholdExceeded,
    r"remapped_rows\.correctable": lambda nv, gpu: rows(nv, gpu, 0),
    r"remapped_rows\.uncorrectable": lambda nv, gpu: rows(nv, gpu, 1),
    r"remapped_rows\.pending": lambda nv, gpu: rows(nv, gpu, 2),
    r"remapped_rows\.failure": lambda nv, gpu: rows(nv, gpu, 3),
    r"retired_pages\.single_bit": lambda nv, gpu: retired(nv, gpu, 0),
    r"retired_pages\.double_bit": lambda nv, gpu: retired(nv, gpu, 1),
    r"retired_pages\.pending": lambda nv, gpu: retired(nv, gpu, 2),
    r"row_remapper": lambda nv, gpu: int(rows(nv, gpu, 0) >= 0),
    r"banks": lambda nv, gpu: sum(
        getattr(nv.nvmlDeviceGetRowRemapperHistogram(gpu), name) for name in ("max", "high", "partial", "low", "none")
    ),
    r"mig_capable": lambda nv, gpu: int(nv.nvmlDeviceGetMaxMigDeviceCount(gpu) == 7),
    r"pcie\.gen": lambda nv, gpu: nv.nvmlDeviceGetCurrPcieLinkGeneration(gpu),
    r"pcie\.width": lambda nv, gpu: nv.nvmlDeviceGetCurrPcieLinkWidth(gpu),
    r"pcie\.replays": lambda nv, gpu: nv.nvmlDeviceGetPcieReplayCounter(gpu),
    r"pcie_max\.gen": lambda nv, gpu: nv.nvmlDeviceGetMaxPcieLinkGeneration(gpu),
    r"pcie_max\.width": lambda nv, gpu: nv.nvmlDeviceGetMaxPcieLinkWidth(gpu),
    r"nvlink\.(\d+)\.state": lambda nv, gpu, link: (
        "active" if nv.nvmlDeviceGetNvLinkState(gpu, int(link)) else "inactive"
    ),
    r"nvlink\.(\d+)\.replays": lambda nv, gpu, link: field(nv, gpu, 161, int(link)),
    r"nvlink\.(\d+)\.recoveries": lambda nv, gpu, link: nv.nvmlDeviceGetNvLinkErrorCounter(gpu, int(link), 1),
    r"nvlink\.(\d+)\.crc_errors": lambda nv, gpu, link: field(nv, gpu, 163, int(link)),
    r"nvlink_links": lambda nv, gpu: field(nv, gpu, 91),
    r"nvlink_version": lambda nv, gpu: nv.nvmlDeviceGetNvLinkVersion(gpu, 0),
    r"nvlink_mbps": lambda nv, gpu: field(nv, gpu, 164, 0),
    r"recovery_action": lambda nv, gpu: field(nv, gpu, 230),
    r"fabric\.(\w+)": lambda nv, gpu, part: getattr(
        fabric(nv, gpu), {"state": "state", "status": "status", "health": "healthMask"}[part]
    ),
    r"lost|present|init_failed": None,
}


def sram_status(nv: Any, gpu: Any) -> Any:
    status = nv.c_nvmlEccSramErrorStatus_v1_t()
    status.version = nv.nvmlEccSramErrorStatus_v1
    assert nv.nvmlDeviceGetSramEccErrorStatus(gpu, ctypes.byref(status)) == 0
    return status


def fabric(nv: Any, gpu: Any) -> Any:
    info = nv.c_nvmlGpuFabricInfo_v3_t()
    assert nv.nvmlDeviceGetGpuFabricInfoV(gpu, ctypes.byref(info)) == 0
    return info


def same(told: str, found: object) -> bool:
    return float(told) == found if isinstance(found, (int, float)) else told == found


def disagreements(nv: Any, state: Mapping[str, str]) -> tuple[int, list[str]]:
    """How many keys were asked for, and those whose answer is another than the file's."""
    asked, wrong = 0, []
    for key, told in state.items():
        where = re.fullmatch(r"gpu\.(\d+)\.(.+)", key)
        if not where:
            continue
        gpu = nv.nvmlDeviceGetHandleByIndex(int(where[1]))
        readers = [(r, m) for pattern, r in READERS.items() if (m := re.fullmatch(pattern, where[2]))]
        assert len(readers) == 1, f"{key}: {len(readers)} readers; a value that nobody can see is no part of the state"
        reader, words = readers[0]
        if reader is None:
            continue
        asked += 1
        found = reader(nv, gpu, *words.groups())
        # Rows and pages exclude each other: what a board does not have, NVML does not answer.
        if not same(told, found) and found != -1:
            wrong.append(f"{key}: {told} in the file, {found} from NVML")
    return asked, wrong


@pytest.mark.parametrize("board", boards())
def test_nvidia_ml_py_reads_every_value_of_the_state_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: str
) -> None:
    node = on(tmp_path, board)
    sick(node)
    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    try:
        assert nv.nvmlSystemGetDriverVersion() == VERSION
        assert nv.nvmlDeviceGetCount() == 8
        asked, wrong = disagreements(nv, node.state)
    finally:
        nv.nvmlShutdown()
    assert wrong == []
    assert asked > 8 * 45
    print(f"{board}: {asked} values of the state file are those of nvidia-ml-py")


def test_a_wrong_answer_would_be_seen(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    try:
        state = {key: "7" if key == "gpu.1.pcie.replays" else value for key, value in node.state.items()}
        assert disagreements(nv, state)[1] == ["gpu.1.pcie.replays: 7 in the file, 0 from NVML"]
    finally:
        nv.nvmlShutdown()


def test_structures_are_as_long_as_those_of_nvidia_ml_py(tmp_path: Path) -> None:
    """A structure with a version checks itself; of the others, what would be overwritten shows."""
    import pynvml

    pairs = {
        "nvmlPciInfo_t": pynvml.nvmlPciInfo_t,
        "nvmlMemory_t": pynvml.c_nvmlMemory_t,
        "nvmlMemory_v2_t": pynvml.c_nvmlMemory_v2_t,
        "nvmlBAR1Memory_t": pynvml.c_nvmlBAR1Memory_t,
        "nvmlUtilization_t": pynvml.c_nvmlUtilization_t,
        "nvmlEccErrorCounts_t": pynvml.c_nvmlEccErrorCounts_t,
        "nvmlEccSramErrorStatus_t": pynvml.c_nvmlEccSramErrorStatus_v1_t,
        "nvmlFieldValue_t": pynvml.c_nvmlFieldValue_t,
        "nvmlGpuFabricInfo_t": pynvml.c_nvmlGpuFabricInfo_t,
        "nvmlGpuFabricInfo_v2_t": pynvml.c_nvmlGpuFabricInfo_v2_t,
        "nvmlGpuFabricInfo_v3_t": pynvml.c_nvmlGpuFabricInfo_v3_t,
        "nvmlProcessInfo_t": pynvml.c_nvmlProcessInfo_v3_t,
        "nvmlRowRemapperHistogramValues_t": pynvml.c_nvmlRowRemapperHistogramValues,
        "nvmlTemperature_t": pynvml.c_nvmlTemperature_v1_t,
        "nvmlMarginTemperature_t": pynvml.c_nvmlMarginTemperature_v1_t,
        "nvmlViolationTime_t": pynvml.c_nvmlViolationTime_t,
    }
    asserts = [f'_Static_assert(sizeof({name}) == {ctypes.sizeof(their)}, "{name}");' for name, their in pairs.items()]
    source = tmp_path / "sizes.c"
    source.write_text('#include "abi.h"\n' + "\n".join(asserts) + "\n")
    done = subprocess.run(
        ["cc", "-fsyntax-only", f"-I{folder.FOLDER}", source], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# --- the real nvidia-smi -------------------------------------------------------------------------------------------


QUERY = {
    "index": None,
    "driver_version": None,
    "name": "name",
    "uuid": "uuid",
    "serial": "serial",
    "compute_cap": "compute",
    "vbios_version": "vbios",
    "memory.total": "memory_mib",
    "memory.used": "memory_used_mib",
    "utilization.gpu": "utilization_gpu",
    "utilization.memory": "utilization_memory",
    "temperature.gpu": "temperature_c",
    "temperature.memory": "temperature_memory_c",
    "power.draw": "power_draw_w",
    "power.limit": "power_w",
    "power.min_limit": "power_min_w",
    "power.max_limit": "power_max_w",
    "clocks.gr": "clocks.graphics",
    "clocks.sm": "clocks.sm",
    "clocks.mem": "clocks.memory",
    "clocks.video": "clocks.video",
    "clocks.max.sm": "clocks_max.sm",
    "clocks.max.mem": "clocks_max.memory",
    "pcie.link.gen.current": "pcie.gen",
    "pcie.link.gen.max": "pcie_max.gen",
    "pcie.link.gen.hostmax": "pcie_max.gen",
    "pcie.link.width.current": "pcie.width",
    "pcie.link.width.max": "pcie_max.width",
    **{
        f"ecc.errors.{kind}.{since}.{where}": f"ecc.{kind}.{since}.{where}"
        for kind in ("corrected", "uncorrected")
        for since in ("volatile", "aggregate")
        for where in ("sram", "dram")
    },
    "retired_pages.sbe": "retired_pages.single_bit",
    "retired_pages.dbe": "retired_pages.double_bit",
}
XML = {
    "product_name": "name",
    "uuid": "uuid",
    "minor_number": "minor",
    "pci/pci_gpu_link_info/pcie_gen/current_link_gen": "pcie.gen",
    "pci/replay_counter": "pcie.replays",
    "fb_memory_usage/used": "memory_used_mib",
    "bar1_memory_usage/total": "bar1_mib",
    "utilization/gpu_util": "utilization_gpu",
    "temperature/gpu_temp": "temperature_c",
    "temperature/memory_temp": "temperature_memory_c",
    "gpu_power_readings/power_draw": "power_draw_w",
    "gpu_power_readings/current_power_limit": "power_w",
    "clocks/sm_clock": "clocks.sm",
    "max_clocks/sm_clock": "clocks_max.sm",
    "ecc_errors/volatile/sram_correctable": "ecc.corrected.volatile.sram",
    # By its second name on boards before Ampere.
    "ecc_errors/volatile/sram_uncorrectable_secded|ecc_errors/volatile/sram_uncorrectable": (
        "ecc.uncorrected.volatile.sram"
    ),
    "ecc_errors/volatile/dram_correctable": "ecc.corrected.volatile.dram",
    "ecc_errors/volatile/dram_uncorrectable": "ecc.uncorrected.volatile.dram",
    "ecc_errors/aggregate/dram_uncorrectable": "ecc.uncorrected.aggregate.dram",
    "remapped_rows/remapped_row_corr": "remapped_rows.correctable",
    "remapped_rows/remapped_row_unc": "remapped_rows.uncorrectable",
    "remapped_rows/remapped_row_pending": "remapped_rows.pending",
    "remapped_rows/remapped_row_failure": "remapped_rows.failure",
}
REASONS = {
    "gpu_idle": 0x1,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
}


def agrees(said: str, told: str) -> bool:
    """As nvidia-smi writes it: with a unit, with two digits, yes and no."""
    word = re.sub(r" (MiB|MHz|W|C|%)$", "", said)
    digits = re.fullmatch(r"\d+(\.\d+)?", told) and f"{float(told):.2f}"
    return word in {told, digits, {"0": "No", "1": "Yes"}.get(told)}


@pytest.mark.parametrize("board", boards())
def test_the_real_nvidia_smi_prints_the_values_of_the_state_file(tmp_path: Path, board: str) -> None:
    node = on(tmp_path, board)
    sick(node)
    state = node.state
    compared, wrong = 0, []

    def compare(what: str, gpu: int, key: str, said: str | None) -> None:
        nonlocal compared
        told = state.get(f"gpu.{gpu}.{key}")
        pages = key.startswith("retired_pages") and state[f"gpu.{gpu}.row_remapper"] == "1"
        rows_of = key.startswith("remapped_rows") and state[f"gpu.{gpu}.row_remapper"] == "0"
        if told is None or pages or rows_of:
            return
        compared += 1
        if said is None or not agrees(said, told):
            wrong.append(f"{what} of GPU {gpu}: {said}, the state file says {told}")

    queried = node.smi(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
    assert queried.returncode == 0, queried.stdout
    for gpu, line in enumerate(queried.stdout.splitlines()):
        for (name, key), said in zip(QUERY.items(), line.split(", "), strict=True):
            if key:
                compare(name, gpu, key, said)

    whole = node.smi("-q", "-x")
    assert whole.returncode == 0
    log = ElementTree.fromstring(whole.stdout)  # noqa: S314 - nvidia-smi wrote it a moment ago
    assert (log.findtext("driver_version"), log.findtext("attached_gpus")) == (VERSION, "8")
    for gpu, element in enumerate(log.findall("gpu")):
        for path, key in XML.items():
            said = [text for name in path.split("|") if (text := element.findtext(name)) is not None]
            compare(path, gpu, key, said[0] if said else None)
        asleep = 0 if state.get(f"gpu.{gpu}.utilization_gpu", "0") != "0" else 1
        mask = int(state.get(f"gpu.{gpu}.clocks_event_reasons", asleep))
        for reason, bit in REASONS.items():
            active = element.findtext(f"clocks_event_reasons/clocks_event_reason_{reason}")
            assert active == ("Active" if mask & bit else "Not Active"), reason

    listed = node.smi("-L")
    assert listed.stdout.splitlines() == [
        f"GPU {gpu}: {state[f'gpu.{gpu}.name']} (UUID: {state[f'gpu.{gpu}.uuid']})" for gpu in range(8)
    ]
    overview = node.smi()
    assert overview.returncode == 0
    assert f"Driver Version: {VERSION}" in overview.stdout
    assert overview.stdout.count(state["gpu.0.name"][:25]) == 8
    # The column of 535 has room for five digits.
    total = state["gpu.0.memory_mib"]
    assert re.search(rf"/ *{total}MiB" if len(total) < 6 else rf"/ {total[:5]}\.\.\.", overview.stdout)
    assert not re.search(r"ERR!|Unknown Error|Function Not Found", overview.stdout + whole.stdout)
    assert wrong == []
    assert compared > 8 * 30
    print(f"{board}: {compared} values of -q -x and --query-gpu are those of the state file")


# --- load and processes --------------------------------------------------------------------------------------------


def test_temperature_power_and_clocks_move_with_the_load(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    gpu = nv.nvmlDeviceGetHandleByIndex(1)
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    # Of a process that had this number before: it began at another time.
    node.write(f"run/gpuyard-lab/processes/{os.getpid()}", "1 5000 90 0 1\n")
    try:
        readings = []
        for load in (None, 1, 40, 100):
            if load:
                since = Path(f"/proc/{engine.pid}/stat").read_text().rpartition(")")[2].split()[19]
                node.write(f"run/gpuyard-lab/processes/{engine.pid}", f"{since} 73403 {load} 0 1\n")
            readings.append(
                (
                    nv.nvmlDeviceGetUtilizationRates(gpu).gpu,
                    nv.nvmlDeviceGetTemperature(gpu, 0),
                    nv.nvmlDeviceGetPowerUsage(gpu) / 1000,
                    nv.nvmlDeviceGetClockInfo(gpu, 1),
                    nv.nvmlDeviceGetCurrentClocksEventReasons(gpu),
                    nv.nvmlDeviceGetMemoryInfo(gpu).used // MIB,
                )
            )
        assert readings == [
            (0, 30, 70, 345, 1, 0),
            (1, 30, 76.3, 1980, 0, 73403),
            (40, 44, 322, 1980, 0, 73403),
            (100, 65, 700, 1980, 0, 73403),
        ]
        assert [process.pid for process in nv.nvmlDeviceGetComputeRunningProcesses(gpu)] == [engine.pid]
        apps = node.smi("--query-compute-apps=pid,gpu_uuid,used_memory", "--format=csv,noheader").stdout.splitlines()
        assert apps == [f"{engine.pid}, {node.state[f'gpu.{n}.uuid']}, 73403 MiB" for n in (0, 1)]
        assert re.search(rf"\|\s+1\s+N/A\s+N/A\s+{engine.pid}\s+C\s+\S+\s+73403MiB \|", node.smi().stdout)
    finally:
        engine.kill()
        engine.wait(10)
    try:
        assert nv.nvmlDeviceGetComputeRunningProcesses(gpu) == [], "killed, and its file still there"
        assert nv.nvmlDeviceGetMemoryInfo(gpu).used == 0
    finally:
        nv.nvmlShutdown()


def test_an_idle_board_that_sleeps_has_its_link_at_the_slowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = on(tmp_path, "L4")
    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    try:
        gpu = nv.nvmlDeviceGetHandleByIndex(0)
        assert (nv.nvmlDeviceGetPerformanceState(gpu), nv.nvmlDeviceGetCurrPcieLinkGeneration(gpu)) == (8, 1)
        node.patch(gpus={"0": {"utilization_gpu": 5}})
        assert (nv.nvmlDeviceGetPerformanceState(gpu), nv.nvmlDeviceGetCurrPcieLinkGeneration(gpu)) == (0, 4)
    finally:
        nv.nvmlShutdown()


def test_whoever_asks_nvml_holds_the_device_until_it_shuts_nvml_down(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> set[str]:
        links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return {link.name for link in links if link.parent == node.root / "dev"}

    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    nv.nvmlDeviceGetHandleByIndex(3)
    assert opened() == {"nvidiactl", "nvidia3"}
    nv.nvmlShutdown()
    assert opened() == set()
    with pytest.raises(nv.NVMLError_Uninitialized):
        nv.nvmlDeviceGetCount()


# --- faults --------------------------------------------------------------------------------------------------------


def test_every_return_code_reaches_whoever_asks(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    first, second = nv.nvmlDeviceGetHandleByIndex(0), nv.nvmlDeviceGetHandleByIndex(1)
    try:
        for code in CODES:
            node.inject(nvmlDeviceGetTemperature=code)
            with pytest.raises(nv.NVMLError) as caught:
                nv.nvmlDeviceGetTemperature(first, 0)
            assert caught.value.value == code
            assert nv.nvmlDeviceGetTemperature(second, 0) == 30, "the others are well"
            assert nv.nvmlDeviceGetName(first), "and so is every other question"
        node.patch()
        assert nv.nvmlDeviceGetTemperature(first, 0) == 30
    finally:
        nv.nvmlShutdown()


def test_nvidia_smi_survives_every_return_code_of_every_question(node: Node) -> None:
    for code in CODES:
        node.inject(every=code)
        for words in ((), ("-q", "-x"), ("--query-gpu=temperature.gpu", "--format=csv,noheader")):
            done = node.smi(*words)
            assert done.returncode >= 0, f"{code}: killed by signal {-done.returncode}"
            if words and words[0] == "--query-gpu=temperature.gpu" and code == 15:
                assert done.returncode == 15


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlSystemGetDriverVersion"])
def test_functions_that_are_about_no_gpu_fail_too(node: Node, function: str) -> None:
    node.inject(**{function: 999})
    assert node.smi("-q").returncode == 255 or "Unknown Error" in node.smi("-q").stdout


def test_every_function_of_the_library_can_be_made_to_fail(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = subprocess.run(["nm", "-D", "--defined-only", library()], capture_output=True, text=True, check=True)
    names = sorted(set(re.findall(r" T (nvml\w+)", listing.stdout)))
    assert len(names) > 150
    untouched = {"nvmlErrorString", "nvmlInternalGetExportTable", "nvmlShutdown", "nvmlSystemGetNVMLVersion"}
    nv = use_library(node, monkeypatch)
    nv.nvmlInit()
    gpu = nv.nvmlDeviceGetHandleByIndex(0)
    functions = ctypes.CDLL(str(library()))
    about_one = re.compile(r"nvmlDeviceGetHandleBy")
    room = (ctypes.c_ubyte * 8192)()
    pointer = ctypes.cast(room, ctypes.c_void_p)
    try:
        for name in names:
            if name in untouched or name.startswith("nvmlInit") or about_one.match(name):
                continue
            node_wide = not name.startswith("nvmlDevice") or name in ("nvmlDeviceGetCount", "nvmlDeviceGetCount_v2")
            inject_fast(node, name)
            words = [pointer] * 6 if node_wide else [gpu, *[pointer] * 5]
            assert getattr(functions, name)(*words) == 20, name
        inject_fast(node, None)
    finally:
        nv.nvmlShutdown()


def inject_fast(node: Node, function: str | None) -> None:
    """What `apply` would write, without a process for each of two hundred."""
    file = node.root / "run/gpuyard-lab/gpus.state"
    lines = [line for line in file.read_text().splitlines()[1:-1] if ".nvml." not in line]
    if function:
        lines.append(f"gpu.0.nvml.{function.split('_')[0]}=20")
    fresh = file.with_suffix(".new")
    fresh.write_text("\n".join(["gpuyard-gpus 1", *sorted(lines, key=lambda line: line.split("=")[0]), "end", ""]))
    fresh.rename(file)


def test_a_hanging_function_hangs_until_it_is_mended(node: Node) -> None:
    node.inject(nvmlDeviceGetTemperature="hang")
    with pytest.raises(subprocess.TimeoutExpired):
        node.smi("--query-gpu=temperature.gpu", "--format=csv,noheader", timeout=1)
    assert node.smi("--query-gpu=name", "--format=csv,noheader", timeout=10).returncode == 0, (
        "others do not wait for it"
    )
    waiting = subprocess.Popen(
        [sys.executable, "-c", "import pynvml as n; n.nvmlInit(); g = n.nvmlDeviceGetHandleByIndex(0)\n"
         "print(n.nvmlDeviceGetTemperature(g, 0))"],
        env=node.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        time.sleep(0.5)
        assert waiting.poll() is None
        node.patch()
        assert waiting.communicate(timeout=10)[0] == "30\n"
    finally:
        waiting.kill()
        waiting.wait(10)


def garbage(text: str) -> dict[str, bytes | None]:
    whole = text.encode()
    return {
        "missing": None,
        "empty": b"",
        "zeros": bytes(4096),
        "noise": os.urandom(65536),
        "JSON": b'{"gpus": []}',
        "cut": whole[: len(whole) // 2],
        "without its end": whole.removesuffix(b"end\n"),
        "of another version": whole.replace(b"gpuyard-gpus 1", b"gpuyard-gpus 2"),
        "a line without a value": whole.replace(b"gpu.0.lost=0", b"gpu.0.lost"),
        "unsorted": whole.replace(b"gpu.0.lost=0", b"zzz=0"),
        "a key twice": whole.replace(b"gpu.0.lost=0", b"gpu.0.lost=0\ngpu.0.lost=1"),
    }


@pytest.mark.parametrize("kind", garbage(""))
def test_garbage_in_place_of_the_state_is_an_unknown_error(node: Node, kind: str) -> None:
    file = node.root / "run/gpuyard-lab/gpus.state"
    content = garbage(file.read_text())[kind]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    for words in ((), ("-L",), ("-q", "-x")):
        done = node.smi(*words)
        assert (done.returncode, "Unknown Error" in done.stdout) == (255, True), done
    node.apply()
    assert node.smi("-L").returncode == 0, "apply writes it anew"


def test_nonsense_values_break_nothing(node: Node) -> None:
    """`apply` refuses them; who writes the file by hand gets answers, not a crash."""
    file = node.root / "run/gpuyard-lab/gpus.state"
    text = re.sub(r"^(gpu\.\d+\.[^=]+)=.*$", r"\1=%s%n\\x-1e400" + "A" * 300, file.read_text(), flags=re.MULTILINE)
    file.write_text(text)
    for words in ((), ("-L",), ("-q", "-x"), (f"--query-gpu={','.join(QUERY)}", "--format=csv")):
        assert node.smi(*words).returncode >= 0


# --- against what others recorded on real boards -------------------------------------------------------------------

# Elements that the recording's nvidia-smi prints and that of 535.309 does not, or says with another number; and why.
NEWER = "a newer nvidia-smi than 535 says it"
OTHER: Mapping[str, str] = {
    r"PCI/(Base|Sub) Classcode": NEWER,
    r"GPU Memory Power Readings.*": NEWER,
    r"GPU C2C Mode|Platform Info/.*": NEWER,
    r"Fabric/(CliqueId|ClusterUUID|Health.*)": NEWER,
    r"GPU Virtualization Mode/vGPU Heterogeneous Mode": NEWER,
    r"Capabilities.*": NEWER,
    r"Clocks Event Reasons/.*": "of the moment",
    r"Performance State": "of the moment",
    r"GPU Virtualization Mode/Virtualization Mode|PCI/GPU Link Info/Link Width/Current": "the recording's machine",
    r".*(Inforom|BBX|Host VGPU).*": "not simulated",
    r"GPU Part Number|FRU Part Number|Board Part Number": "not simulated, or of another lot",
    r"GPU Reset Status.*|GPU Recovery Action": "said in other words since 565",
    r"Addressing Mode|Sparse Operation Mode|PCI/Atomic Caps.*|PCI/.*Host Max": "not simulated, or of another host",
    r"(Default )?Applications Clocks/Graphics|Max Customer Boost.*": "set by the recording's owner",
    r"GPU Power Readings/.*Limit": "the recorded board has another limit",
    r"Persistence Mode|MIG Mode.*|Display Mode": "set by the recording's owner",
    r"Supported.*": "not simulated",
}


def labels(text: str) -> dict[str, str]:
    """`-q` as paths of labels, of the first GPU."""
    found: dict[str, str] = {}
    stack: list[str] = []
    for line in re.split(r"\n(?=GPU 0000)", text)[1].splitlines()[1:]:
        if line.strip():
            depth = (len(line) - len(line.lstrip())) // 4
            name, colon, value = (re.sub(r"\s+", " ", part).strip() for part in line.partition(" : "))
            stack = [*stack[: depth - 1], name]
            found["/".join(stack) + ("" if colon else "/")] = value
    return found


def test_what_real_boards_print_is_what_ours_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_of_table, unexplained, known_for = [], [], set[str]()
    for board, recording in RECORDED["text"].items():
        node = on(tmp_path / board, board)
        node.write("run/gpuyard-lab/fabric", "a fabric manager ran")
        ours = labels(node.smi("-q", "-i", "0").stdout)
        counts = dict.fromkeys(("same", "value differs", "only recorded", "only ours", "of the moment"), 0)
        for path, value in recording["values"].items():
            if path not in ours:
                kind = "only recorded"
            elif value is None:
                kind = "of the moment"
            else:
                kind = "same" if ours[path] == value else "value differs"
            counts[kind] += 1
            if kind in ("value differs", "only recorded"):
                reason = next((reason for known, reason in OTHER.items() if re.fullmatch(known, path)), None)
                said = f"{path}: {value} recorded, {ours.get(path, 'nothing')} here"
                known_for.add(f"    {said} ({reason})")
                if reason is None:
                    unexplained.append(f"{board}: {said}")
        counts["only ours"] = len(ours.keys() - recording["values"].keys())
        rows_of_table.append([board, recording["driver"], *map(str, counts.values())])
    theirs = set(RECORDED["xml"]["A100-SXM4-80GB"]["elements"])
    printed = on(tmp_path / "xml", "A100-SXM4-80GB").smi("-q", "-x", "-i", "0").stdout
    log = ElementTree.fromstring(printed)  # noqa: S314 - nvidia-smi wrote it a moment ago
    mine = {"/".join(path) for path in paths(log.find("gpu"))}
    with capsys.disabled():
        print("\n  board            recorded by     same  differs  only recorded  only ours  of the moment")
        for row in rows_of_table:
            print("  {:<16} {:<14} {:>5} {:>8} {:>14} {:>10} {:>14}".format(*row))
        print("  what differs or is only recorded, with the reason:", *sorted(known_for), sep="\n")
        print(f"  -q -x of an A100: {len(theirs & mine)} elements are the same, only recorded:")
        print("    " + ", ".join(sorted(theirs - mine)) or "none")
    assert unexplained == [], "\n".join(unexplained)
    assert len(theirs & mine) > 150
    assert {path.split("/")[0] for path in theirs - mine} <= {"ecc_errors", "mig_devices", "remapped_rows"}


def paths(element: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for child in element:
        here = (*above, child.tag)
        found += [here, *paths(child, here)]
    return found
