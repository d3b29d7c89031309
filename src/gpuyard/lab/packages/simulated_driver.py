#!/usr/bin/python3
"""The user's side of a simulated NVIDIA driver: one file, installed by each package under the name of its program.

Ends as the real programs end, with their words and exit codes, when no driver is loaded or another one than installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(os.environ.get("GPUYARD_LAB_ROOT", "/"))
OWN_VERSION = "@VERSION@"
CUDA = {"580": "13.0", "590": "13.1"}


def loaded_version() -> str | None:
    try:
        line = (ROOT / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", line)
    return found.group(1) if found else None


def library_version() -> str | None:
    """The version of the NVML library on the disk; its file is named after it."""
    for link in (ROOT / "usr/lib").glob("*/libnvidia-ml.so.1"):
        return link.readlink().name.split(".so.", 1)[1]
    return None


def gpus() -> list[dict[str, Any]]:
    try:
        return json.loads((ROOT / "var/lib/gpuyard-lab/gpus.json").read_text())["gpus"]
    except OSError:
        return []


def switches() -> list[dict[str, Any]]:
    return json.loads((ROOT / "var/lib/gpuyard-lab/gpus.json").read_text())["switches"]


def device_users() -> dict[int, set[int]]:
    """Processes by the GPU they hold."""
    users: dict[int, set[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = list((process / "fd").iterdir())
        except OSError:
            continue
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile
                found = re.fullmatch(re.escape(str(ROOT / "dev/nvidia")) + r"(\d+)", str(entry.readlink()))
                if found:
                    users.setdefault(int(found.group(1)), set()).add(int(process.name))
    return users


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def is_persistenced(pid: int) -> bool:
    return any(Path(word).name == "nvidia-persistenced" for word in command_of(pid)[:2])


# --- nvidia-smi --------------------------------------------------------------------------------------------------


class SmiError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def nvml_init() -> None:
    library = library_version()
    if library is None:
        raise SmiError(
            12,
            "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display "
            "Driver is properly installed and present in your system.\n"
            "Please also try adding directory that contains libnvidia-ml.so to your system PATH.",
        )
    loaded = loaded_version()
    if loaded is None:
        raise SmiError(
            9,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.\n",
        )
    if loaded != library:
        short = ".".join(library.split(".")[:2])
        raise SmiError(18, f"Failed to initialize NVML: Driver/library version mismatch\nNVML library version: {short}")
    if not gpus():
        raise SmiError(6, "No devices were found")


class Gpu:
    """One GPU with everything that may be asked of it."""

    def __init__(self, index: int, board: dict[str, Any], users: set[int]) -> None:
        self.index = index
        self.board = board
        self.persistent = any(is_persistenced(pid) for pid in users)
        self.computing = sorted(pid for pid in users if not is_persistenced(pid))

    @property
    def bus_id(self) -> str:
        return "0000" + self.board["bdf"].upper()

    @property
    def draw(self) -> float:
        return self.board["power_w"] * 0.1

    def field(self, name: str) -> str | None:
        asked = FIELDS.get(name)
        return None if asked is None else str(asked(self))


FIELDS: dict[str, Callable[[Gpu], Any]] = {
    "timestamp": lambda _: time.strftime("%Y/%m/%d %H:%M:%S.000"),
    "index": lambda gpu: gpu.index,
    "count": lambda _: len(gpus()),
    "name": lambda gpu: gpu.board["name"],
    "uuid": lambda gpu: gpu.board["uuid"],
    "serial": lambda gpu: gpu.board["serial"],
    "driver_version": lambda _: loaded_version(),
    "pci.bus_id": lambda gpu: gpu.bus_id,
    "pci.device_id": lambda gpu: f"{gpu.board['device'].upper().replace('X', 'x')}10DE",
    "compute_cap": lambda gpu: gpu.board["compute"],
    "compute_mode": lambda _: "Default",
    "mig.mode.current": lambda _: "Disabled",
    "persistence_mode": lambda gpu: "Enabled" if gpu.persistent else "Disabled",
    "pstate": lambda _: "P0",
    "memory.total": lambda gpu: gpu.board["memory_mib"],
    "memory.used": lambda _: 0,
    "memory.free": lambda gpu: gpu.board["memory_mib"],
    "utilization.gpu": lambda _: 0,
    "utilization.memory": lambda _: 0,
    "temperature.gpu": lambda _: 30,
    "power.draw": lambda gpu: f"{gpu.draw:.2f}",
    "power.limit": lambda gpu: f"{gpu.board['power_w']:.2f}",
    "ecc.mode.current": lambda _: "Enabled",
    "ecc.errors.corrected.volatile.total": lambda _: 0,
    "ecc.errors.uncorrected.volatile.total": lambda _: 0,
    "ecc.errors.uncorrected.aggregate.total": lambda _: 0,
}
FIELDS.update({"gpu_name": FIELDS["name"], "gpu_uuid": FIELDS["uuid"], "gpu_bus_id": FIELDS["pci.bus_id"]})
UNITS = {"memory": "MiB", "utilization": "%", "power": "W"}


def unit(field: str) -> str:
    return UNITS.get(field.split(".")[0], "") if "." in field else ""


def chosen(words: dict[str, str]) -> list[Gpu]:
    users = device_users()
    all_gpus = [Gpu(index, board, users.get(index, set())) for index, board in enumerate(gpus())]
    asked = words.get("--id", words.get("-i"))
    if asked is None:
        return all_gpus
    ids = asked.split(",")
    found = [gpu for gpu in all_gpus if {str(gpu.index), gpu.board["uuid"], gpu.bus_id} & set(ids)]
    if not found:
        raise SmiError(6, "No devices were found")
    return found


def table_of_values(rows: list[list[str]], header: list[str], units: list[str], style: set[str]) -> str:
    columns = range(len(header))
    lines: list[str] = []
    if "noheader" not in style:
        lines.append(", ".join(f"{header[i]} [{units[i]}]" if units[i] else header[i] for i in columns))
    for row in rows:
        lines.append(
            ", ".join(f"{row[i]} {units[i]}" if units[i] and "nounits" not in style else row[i] for i in columns)
        )
    return "\n".join(lines)


def csv_style(words: dict[str, str]) -> set[str]:
    style = set(words.get("--format", "").split(","))
    if "csv" not in style:
        raise SmiError(2, '"--format=" switch is missing. It is required when one of the --query-* switches is used.')
    return style


def query_gpu(words: dict[str, str]) -> str:
    style = csv_style(words)
    fields = [field.strip() for field in words["--query-gpu"].split(",")]
    rows: list[list[str]] = []
    for gpu in chosen(words):
        row: list[str] = []
        for field in fields:
            value = gpu.field(field)
            if value is None:
                raise SmiError(2, f'Field "{field}" is not a valid field to query.\n')
            row.append(value)
        rows.append(row)
    return table_of_values(rows, fields, [unit(field) for field in fields], style)


def query_compute_apps(words: dict[str, str]) -> str:
    style = csv_style(words)
    fields = [field.strip() for field in words["--query-compute-apps"].split(",")]
    rows: list[list[str]] = []
    for gpu in chosen(words):
        for pid in gpu.computing:
            known = {
                "pid": str(pid),
                "process_name": (command_of(pid) or ["[Not Found]"])[0],
                "gpu_uuid": gpu.board["uuid"],
                "gpu_bus_id": gpu.bus_id,
                "gpu_name": gpu.board["name"],
                "used_gpu_memory": "0",
                "used_memory": "0",
            }
            unknown = next((field for field in fields if field not in known), None)
            if unknown:
                raise SmiError(2, f'Field "{unknown}" is not a valid field to query.\n')
            rows.append([known[field] for field in fields])
    return table_of_values(rows, fields, ["MiB" if field.startswith("used") else "" for field in fields], style)


def list_gpus(words: dict[str, str]) -> str:
    return "\n".join(f"GPU {gpu.index}: {gpu.board['name']} (UUID: {gpu.board['uuid']})" for gpu in chosen(words))


def overview(words: dict[str, str]) -> str:
    version = loaded_version() or ""
    cuda = CUDA.get(version.split(".")[0], "N/A")
    thick, gap = "+" + "-" * 89 + "+", "|" + " " * 41 + "|" + " " * 24 + "|"
    rule = "+" + "-" * 41 + "+" + "-" * 24 + "+" + "-" * 22 + "+"
    lines = [
        time.strftime("%a %b %e %H:%M:%S %Y") + " " * 7,
        thick,
        f"| NVIDIA-SMI {OWN_VERSION:<22} Driver Version: {version:<14} CUDA Version: {cuda:<9}|",
        rule,
        "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |",
        "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |",
        f"{gap}{'MIG M. ':>22}|",
        "|" + rule[1:-1].replace("-", "=") + "|",
    ]
    processes: list[str] = []
    for gpu in chosen(words):
        mode = "On" if gpu.persistent else "Off"
        power = f"{gpu.draw:.0f}W / {gpu.board['power_w']:>4}W"
        memory = f"0MiB / {gpu.board['memory_mib']:>6}MiB"
        lines += [
            f"| {gpu.index:>3}  {gpu.board['name']:<26.26} {mode:>6}  |   {gpu.bus_id} Off | {0:>20} |",
            f"| N/A   30C    P0          {power:>14} | {memory:>22} | {0:>6}%      Default |",
            f"{gap}{'Disabled ':>22}|",
            rule,
        ]
        for pid in gpu.computing:
            name = (command_of(pid) or ["[Not Found]"])[0][-38:]
            processes.append(f"| {gpu.index:>4}   N/A  N/A {pid:>16}      C   {name:<38} {'0MiB':>10} |")
    return "\n".join(
        [
            *lines,
            "",
            thick,
            f"| {'Processes:':<88}|",
            f"|  {'GPU   GI   CI              PID   Type   Process name                        GPU Memory':<87}|",
            f"|  {'      ID   ID                                                               Usage':<87}|",
            "|" + "=" * 89 + "|",
            *(processes or [f"|  {'No running processes found':<87}|"]),
            thick,
        ]
    )


def nvidia_smi(arguments: list[str]) -> int:
    words: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals and name in {"-i", "--id", "--format"} and rest:
            value = rest.pop(0)
        words[name] = value
    answers: dict[str, Callable[[dict[str, str]], str]] = {
        "--query-gpu": query_gpu,
        "--query-compute-apps": query_compute_apps,
        "-L": list_gpus,
        "--list-gpus": list_gpus,
    }
    try:
        if unknown := words.keys() - answers.keys() - {"-i", "--id", "--format"}:
            raise SmiError(
                2, f"Invalid combination of input arguments. Please run 'nvidia-smi -h' for help. ({unknown.pop()})"
            )
        nvml_init()
        answer = next((answers[word] for word in words if word in answers), overview)
        print(answer(words))
    except SmiError as ended:
        print(ended)
        return ended.code
    return 0


# --- daemons ------------------------------------------------------------------------------------------------------


def leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


def stay(opened: list[int]) -> NoReturn:
    """Hold the device files until told to end, as a daemon does that keeps the GPUs awake."""
    signal.signal(signal.SIGTERM, leave)
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"READY=1", address.replace("@", "\0", 1) if address.startswith("@") else address)
    while opened:
        signal.pause()
    sys.exit(1)  # nothing to keep awake


def persistenced(_: list[str]) -> int:
    loaded = loaded_version()
    if loaded is None:
        print(
            "Failed to query NVIDIA devices. Please ensure that the NVIDIA device files (/dev/nvidia*) exist, and that "
            "user 0 has read and write permissions for those files.",
            file=sys.stderr,
        )
        return 1
    if loaded != OWN_VERSION:
        print(
            f"NVRM: API mismatch: the client has the version {OWN_VERSION}, but this kernel module has the version "
            f"{loaded}. Please make sure that they have the same version.",
            file=sys.stderr,
        )
        return 1
    return stay([os.open(ROOT / f"dev/nvidia{index}", os.O_RDWR) for index, _ in enumerate(gpus())])


def fabric_manager(_: list[str]) -> int:
    loaded = loaded_version()
    if loaded is None or not switches():
        print(
            "request to query NVSwitch device information from NVSwitch driver failed with error:WARNING Nothing to do "
            "[NV_WARN_NOTHING_TO_DO]",
            file=sys.stderr,
        )
        return 1
    if loaded != OWN_VERSION:
        print(
            f"fabric manager NVIDIA GPU driver interface version {OWN_VERSION} don't match with driver version "
            f"{loaded}. Please update with matching NVIDIA driver package.",
            file=sys.stderr,
        )
        return 1
    return stay([os.open(ROOT / f"dev/nvidia-nvswitch{index}", os.O_RDWR) for index, _ in enumerate(switches())])


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "nvidia-smi": nvidia_smi,
    "nvidia-persistenced": persistenced,
    "nv-fabricmanager": fabric_manager,
}

if __name__ == "__main__":
    sys.exit(PROGRAMS[Path(sys.argv[0]).name](sys.argv[1:]))
