"""What the simulated GPUs of a node are and how they are now: the installed hardware with its faults laid over it.

Hardware is /var/lib/gpuyard-lab/gpus.json, written by the role `lab_gpu`. A fault is a JSON merge patch (RFC 7386) in a
file of its own in faults.d. The effective state goes as one sorted text file to /run/gpuyard-lab/gpus.state, where the
simulated NVML reads it at every question. docs/lab.md lists the keys.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
from pathlib import Path

HEADER, FOOTER = "gpuyard-gpus 1", "end"

# Types of what a patch may say. A key whose default is None moves by itself until a patch pins it.
NUMBER = (int, float)
COUNTS = {"volatile": {"sram": int, "dram": int}, "aggregate": {"sram": int, "dram": int}}
CLOCKS = {"graphics": int, "sm": int, "memory": int, "video": int}
LINK = {"state": str, "crc_errors": int, "replays": int, "recoveries": int}
GPU = {
    "bdf": str,
    "class": str,
    "device": str,
    "subsystem": str,
    "name": str,
    "brand": int,
    "uuid": str,
    "serial": str,
    "part_number": str,
    "vbios": str,
    "architecture": int,
    "compute": str,
    "memory_mib": int,
    "bar1_mib": int,
    "mig_capable": bool,
    "row_remapper": bool,
    "power_min_w": NUMBER,
    "power_max_w": NUMBER,
    "power_idle_w": NUMBER,
    "temperature_idle_c": int,
    "temperature_load_c": int,
    "temperature_slowdown_c": int,
    "temperature_shutdown_c": int,
    "temperature_max_c": int,
    "temperature_memory_max_c": int,
    "banks": int,
    "pstate_idle": int,
    "clocks_max": CLOCKS,
    "clocks_idle": CLOCKS,
    "pcie_max": {"gen": int, "width": int},
    "nvlink_links": int,
    "nvlink_version": int,
    "nvlink_mbps": int,
    "present": bool,
    "init_failed": bool,
    "lost": bool,
    "temperature_c": int,
    "temperature_memory_c": int,
    "power_draw_w": NUMBER,
    "power_w": NUMBER,
    "utilization_gpu": int,
    "utilization_memory": int,
    "memory_used_mib": int,
    "clocks": CLOCKS,
    "clocks_event_reasons": int,
    "ecc": {"enabled": bool, "corrected": COUNTS, "uncorrected": COUNTS, "sram_threshold_exceeded": bool},
    "remapped_rows": {"correctable": int, "uncorrectable": int, "pending": bool, "failure": bool},
    "retired_pages": {"single_bit": int, "double_bit": int, "pending": bool},
    "pcie": {"gen": int, "width": int, "replays": int},
    "nvlink": {"*": LINK},
    "recovery_action": int,
    "fabric": {"state": int, "status": int, "health": int},
    "nvml": {"*": (int, str)},
}
STATE = {
    "gpus": {"*": GPU},
    "driver": {"load_error": str, "modules_refused": {"*": str}, "foreign_modules": {"*": int}},
}


class StateError(Exception):
    """LAB-STATE: what was found; why; the smallest change that would pass."""

    def __init__(self, file: Path, found: str, change: str) -> None:
        super().__init__(f"LAB-STATE: {file}: {found}; the simulated GPUs stay as they were: {change}")


def read_json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as wrong:
        raise StateError(file, f"is no JSON ({wrong})", "mend or remove it, then run `apply` again") from wrong
    if not isinstance(found, dict):
        raise StateError(file, "holds no JSON object", "mend or remove it, then run `apply` again")
    return found


def installed(root: Path) -> dict:
    """The hardware, as hands left it. Patches name a GPU by its place in this list."""
    file = root / "var/lib/gpuyard-lab/gpus.json"
    try:
        hardware = read_json(file)
    except FileNotFoundError:
        hardware = {"gpus": [], "switches": []}
    if not all(isinstance(hardware.get(kind), list) for kind in ("gpus", "switches")):
        raise StateError(file, "has no lists `gpus` and `switches`", "run the role lab_gpu, which writes it")
    return hardware


def effective(root: Path) -> dict:
    """`{"gpus": {"0": …}, "switches": […], "driver": {…}}` with every key at its value of now."""
    hardware = installed(root)
    state = {"gpus": {str(n): dict(gpu) for n, gpu in enumerate(hardware["gpus"])}, "driver": {}}
    for file in sorted((root / "var/lib/gpuyard-lab/faults.d").glob("*.json")):
        try:
            patch = read_json(file).get("patch")
        except FileNotFoundError:  # mended a moment ago
            continue
        check(file, patch, STATE, "patch")
        patch = links_by_number(patch)
        refuse_what_is_not_there(file, patch, hardware)
        state = merge(state, patch)
    gpus = {number: fill(gpu, defaults(gpu, hardware)) for number, gpu in state["gpus"].items()}
    return {"gpus": gpus, "switches": hardware["switches"], "driver": state.get("driver") or {}}


def refuse_what_is_not_there(file: Path, patch: dict, hardware: dict) -> None:
    for number, gpu in (patch.get("gpus") or {}).items():
        boards = {str(n): board for n, board in enumerate(hardware["gpus"])}
        if number not in boards:
            raise StateError(file, f"patches GPU {number} of a node with {len(boards)} GPUs", "they count from 0")
        links = defaults(boards[number], hardware)["nvlink"]
        if unknown := sorted(set((gpu or {}).get("nvlink") or {}) - set(links)):
            raise StateError(file, f"patches link {unknown[0]} of a GPU with {len(links)} links", "they count from 0")


def check(file: Path, value: object, shape: object, where: str) -> None:
    if value is None and where != "patch":  # takes a value back to what the hardware does
        return
    if not isinstance(shape, dict):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join(kind.__name__ for kind in kinds)
            raise StateError(file, f"{where} is {json.dumps(value)}", f"make it {words}")
        if isinstance(value, str) and not (value.isprintable() and value):
            raise StateError(file, f"{where} is {json.dumps(value)}", "make it one printable line")
        if isinstance(value, NUMBER) and not 0 <= value < 2**64:
            raise StateError(file, f"{where} is {json.dumps(value)}", "make it 0 or more")
        return
    if where.endswith(".nvlink") and isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        raise StateError(file, f"{where} is {json.dumps(value)}", "make it an object")
    for key, inner in value.items():
        known = shape.get("*") or shape.get(key)
        if known is None:
            near = difflib.get_close_matches(str(key), shape, 1)
            keys = f"did you mean `{near[0]}`?" if near else f"it knows {', '.join(shape)}"
            raise StateError(file, f"{where} has a key `{key}` that no simulated GPU has", keys)
        check(file, inner, known, f"{where}.{key}")


def merge(target: object, patch: object) -> object:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def links_by_number(patch: dict) -> dict:
    """Links may be given as a list, from the first on, or by their numbers."""
    gpus = {}
    for number, gpu in (patch.get("gpus") or {}).items():
        links = (gpu or {}).get("nvlink")
        if isinstance(links, list):
            gpu = {**gpu, "nvlink": {str(n): link for n, link in enumerate(links)}}
        gpus[number] = gpu
    return {**patch, "gpus": gpus} if gpus else patch


def fill(value: dict, missing: dict) -> dict:
    filled = dict(missing)
    for key, inner in value.items():
        known = missing.get(key)
        filled[key] = fill(inner, known) if isinstance(inner, dict) and isinstance(known, dict) else inner
    return filled


def defaults(gpu: dict, hardware: dict) -> dict:
    """How a healthy GPU of this kind is. Values that are None here move with the load, or do not exist on this kind."""
    counts = {kind: {"sram": 0, "dram": 0} for kind in ("volatile", "aggregate")}
    fastest = gpu.get("pcie_max") or {"gen": 4, "width": 16}
    link = {"state": "active", "crc_errors": 0, "replays": 0, "recoveries": 0}
    # Links without a switch or a bridge lead nowhere; the boards without an NVSwitch are simulated without bridges.
    links = gpu.get("nvlink_links", 0) if hardware["switches"] else 0
    return {
        "present": True,
        "init_failed": False,
        "lost": False,
        "ecc": {"enabled": True, "corrected": counts, "uncorrected": counts, "sram_threshold_exceeded": False},
        "remapped_rows": {"correctable": 0, "uncorrectable": 0, "pending": False, "failure": False},
        "retired_pages": {"single_bit": 0, "double_bit": 0, "pending": False},
        "pcie_max": fastest,
        "pcie": {"width": fastest["width"], "replays": 0},
        "nvlink": {str(number): link for number in range(links)},
        "recovery_action": 0,
        "fabric": {},
        "clocks": {},
        "nvml": {},
        "row_remapper": True,
        "mig_capable": False,
    }


# --- the file for NVML --------------------------------------------------------------------------------------------


def on_the_bus(state: dict) -> list:
    return [gpu for gpu in state["gpus"].values() if gpu["present"]]


def lines(state: dict) -> list:
    """`key=value`, sorted by the bytes of the key; a GPU has NVML's number, which counts only those that came up."""
    found = {}
    number = 0
    for minor, gpu in enumerate(on_the_bus(state)):
        if gpu["init_failed"]:
            continue
        # NVML does not tell the versions of a function apart.
        functions = {name.split("_")[0]: end for name, end in gpu["nvml"].items()}
        found.update(flat({**gpu, "minor": minor, "nvml": functions}, f"gpu.{number}"))
        number += 1
    found["gpus"] = str(number)
    found["switches"] = str(len(state["switches"]))
    return [f"{key}={found[key]}" for key in sorted(found)]


def flat(value: object, key: str) -> dict:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}.{name}").items()}
    if value is None:
        return {}
    return {key: str(int(value)) if isinstance(value, bool) else str(value)}


@contextlib.contextmanager
def one_at_a_time(root: Path):
    folder = root / "run/gpuyard-lab"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(root: Path, state: dict) -> bool:
    """Whole or not at all, and only where something changed."""
    file = root / "run/gpuyard-lab/gpus.state"
    text = "\n".join([HEADER, *lines(state), FOOTER]) + "\n"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if file.read_text() == text:
            return False
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.replace(file)
    return True
