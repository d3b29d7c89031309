#!/usr/bin/python3
"""The part of a simulated GPU node that a kernel and its PCI bus would be.

Called by its own name with `boot`, it plugs in the hardware that gpus.json lists and loads the installed driver, as a
kernel does at boot; with `apply`, it brings what is seen of the hardware to its faults of now; with `hold`, it holds
the GPUs for an engine. Called as modprobe, rmmod, lsmod or modinfo it answers for NVIDIA's modules and passes all else
on to the real tool. What is loaded is remembered below /run, so that it is forgotten at a reboot like a kernel's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import gpu_state

ROOT = Path(os.environ.get("GPUYARD_LAB_ROOT", "/"))
# Each module with the one it needs.
AT_BOOT = {"nvidia": None, "nvidia_modeset": "nvidia", "nvidia_drm": "nvidia_modeset", "nvidia_uvm": "nvidia"}
MODULES = {**AT_BOOT, "nvidia_peermem": "nvidia"}
SIZES = {
    "nvidia": 14381056,
    "nvidia_modeset": 1814528,
    "nvidia_drm": 139264,
    "nvidia_uvm": 2076672,
    "nvidia_peermem": 16384,
}
LICENSES = {"open": "Dual MIT/GPL", "proprietary": "NVIDIA"}


class RefusedError(Exception):
    """What the real tool would say before it ends with 1."""


def state() -> Path:
    return ROOT / "var/lib/gpuyard-lab"


def hardware() -> dict:
    """What is on the bus now: the installed boards with their faults."""
    found = gpu_state.effective(ROOT)
    return {"gpus": gpu_state.on_the_bus(found), "switches": found["switches"], "driver": found["driver"]}


def installed() -> dict | None:
    """The module that lies on the disk, whatever is loaded."""
    try:
        return json.loads((ROOT / "lib/modules/gpuyard-lab/nvidia.ko").read_text())
    except FileNotFoundError:
        return None


def loaded() -> dict:
    try:
        return json.loads((ROOT / "run/gpuyard-lab/modules.json").read_text())
    except FileNotFoundError:
        return {}


def remember(modules: dict) -> None:
    path = ROOT / "run/gpuyard-lab/modules.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(modules))
    fresh.replace(path)


# --- what is seen of the hardware and of a loaded module -----------------------------------------------------


def plug_in() -> None:
    """The PCI bus as /sys/bus/pci/devices would show it."""
    bus = state() / "pci"
    devices = {device["bdf"]: device for kind in ("gpus", "switches") for device in hardware()[kind]}
    bus.mkdir(parents=True, exist_ok=True)
    for old in bus.iterdir():
        if old.name not in devices:
            shutil.rmtree(old)
    for bdf, device in devices.items():
        slot = bus / bdf
        slot.mkdir(exist_ok=True)
        for name, value in {"vendor": "0x10de", "class": device["class"], "device": device["device"]}.items():
            (slot / name).write_text(value + "\n")


def show_driver(module: dict) -> None:
    """/proc/driver/nvidia and the device files of a loaded driver."""
    version, flavour = module["version"], module["flavour"]
    # The two flavours word this line differently, and programs tell them apart by it.
    kind = "Open Kernel Module for x86_64" if flavour == "open" else "x86_64 Kernel Module"
    proc = ROOT / "proc/driver/nvidia"
    proc.mkdir(parents=True, exist_ok=True)
    (proc / "version").write_text(
        f"NVRM version: NVIDIA UNIX {kind}  {version}  Release Build  (gpuyard@lab)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    present = hardware()
    for minor, gpu in enumerate(present["gpus"]):
        information = proc / "gpus" / gpu["bdf"] / "information"
        information.parent.mkdir(parents=True, exist_ok=True)
        information.write_text(
            f"Model: \t\t {gpu['name']}\nIRQ:   \t\t 0\nGPU UUID: \t {gpu['uuid']}\n"
            f"Bus Type: \t PCIe\nBus Location: \t {gpu['bdf']}\nDevice Minor: \t {minor}\nGPU Excluded:\t No\n"
        )
        make_device(f"nvidia{minor}")
    make_device("nvidiactl")
    if present["switches"]:
        make_device("nvidia-nvswitchctl")
        for number, _ in enumerate(present["switches"]):
            make_device(f"nvidia-nvswitch{number}")
    # What was pulled out is gone from /proc and /dev too; a process that held it keeps what it has.
    for old in (proc / "gpus").iterdir():
        if old.name not in {gpu["bdf"] for gpu in present["gpus"]}:
            shutil.rmtree(old)
    for device in (ROOT / "dev").glob("nvidia[0-9]*"):
        if int(device.name[len("nvidia") :]) >= len(present["gpus"]):
            device.unlink()


def hide_driver() -> None:
    shutil.rmtree(ROOT / "proc/driver/nvidia", ignore_errors=True)
    for device in (ROOT / "dev").glob("nvidia*"):
        device.unlink()


def make_device(name: str) -> None:
    """A device file that can be opened and held. There is no driver behind it, so it is /dev/null by another name."""
    path = ROOT / "dev" / name
    if not path.exists():
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        path.chmod(0o666)


def open_files() -> list:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = list((process / "fd").iterdir())
        except OSError:
            continue
        names = []
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile
                names.append(str(entry.readlink()))
        found.append((int(process.name), names))
    return found


# --- loading and unloading -----------------------------------------------------------------------------------


def needed_by(name: str, modules: dict) -> list:
    return sorted(other for other, below in MODULES.items() if below == name and other in modules)


def used(name: str) -> int:
    """How often a device file of this module is open; the kernel counts each."""
    own = {"nvidia_uvm": r"dev/nvidia-uvm.*", "nvidia_modeset": r"dev/nvidia-modeset", "nvidia_drm": r"dev/dri/.*"}
    own["nvidia"] = r"dev/nvidia(\d+|ctl|-nvswitch.*)"
    device = re.compile(re.escape(str(ROOT)).rstrip("/") + "/" + own.get(name, "(?!)") + r"( \(deleted\))?")
    return sum(1 for _, names in open_files() for opened in names if device.fullmatch(opened))


def insert(name: str) -> None:
    modules = loaded()
    if name in modules:
        return
    while name == "nvidia" and hardware()["driver"].get("load_error") == "hang":
        time.sleep(0.2)
    module = installed()
    if module is None:
        release = os.uname().release
        raise RefusedError(f"FATAL: Module {name} not found in directory /lib/modules/{release}")
    present = hardware()
    refused = (present["driver"].get("modules_refused") or {}).get(name)
    if name == "nvidia":
        refused = refused or present["driver"].get("load_error")
    if refused or not present["gpus"]:
        raise RefusedError(f"ERROR: could not insert '{name}': {refused or 'No such device'}")
    below = MODULES[name]
    if below:
        insert(below)
        modules = loaded()
        if modules[below]["version"] != module["version"]:
            raise RefusedError(f"ERROR: could not insert '{name}': Invalid argument")
    else:
        show_driver(module)
    if name == "nvidia_uvm":
        make_device("nvidia-uvm")
        make_device("nvidia-uvm-tools")
    remember({**modules, name: module})


def take_out(name: str) -> None:
    """Unload one module; the caller puts its tool's name before a refusal."""
    modules = loaded()
    if name not in modules:
        raise RefusedError(f"Module {name} is not currently loaded")
    above = needed_by(name, modules)
    if above:
        raise RefusedError(f"Module {name} is in use by: {' '.join(above)}")
    if used(name):
        raise RefusedError(f"Module {name} is in use")
    del modules[name]
    if name == "nvidia_uvm":
        for device in (ROOT / "dev").glob("nvidia-uvm*"):
            device.unlink()
    if name == "nvidia":
        hide_driver()
        with contextlib.suppress(FileNotFoundError):
            (ROOT / "run/gpuyard-lab/fabric").unlink()
    remember(modules)


# --- the tools -----------------------------------------------------------------------------------------------


def module_names(words: list) -> list:
    """Our modules among the words of a command, with the dashes that the real tools accept too."""
    names = [word.replace("-", "_") for word in words if not word.startswith("-")]
    return [name for name in names if name in MODULES]


def modprobe(words: list) -> None:
    flags = [word for word in words if word.startswith("-")]
    letters = {letter for flag in flags if not flag.startswith("--") for letter in flag[1:]}
    names = module_names(words)
    remove = "r" in letters or "--remove" in flags
    dry = "n" in letters or {"--dry-run", "--show"} & set(flags)
    if not ({"a", "r"} & letters or {"--all", "--remove"} & set(flags)):
        names = names[:1]  # what follows the name are parameters of the module
    try:
        for name in names:
            if remove and not dry:
                remove_with_what_it_needed(name)
            elif not remove and dry:
                if installed() is None:
                    raise RefusedError(f"FATAL: Module {name} not found in directory /lib/modules/{os.uname().release}")
            elif not remove:
                insert(name)
    except RefusedError as refusal:
        if "q" in letters or "--quiet" in flags:
            raise RefusedError("") from refusal
        raise RefusedError(f"modprobe: {refusal}") from refusal


def remove_with_what_it_needed(name: str) -> None:
    if name not in loaded():
        if installed() is None:
            raise RefusedError(f"FATAL: Module {name} not found.")
        return
    try:
        take_out(name)
    except RefusedError as refusal:
        raise RefusedError(f"FATAL: {str(refusal).split(' by:')[0]}.") from refusal
    below = MODULES[name]
    while below and below in loaded() and not needed_by(below, loaded()) and not used(below):
        take_out(below)
        below = MODULES[below]


def rmmod(words: list) -> None:
    for name in module_names(words):
        try:
            take_out(name)
        except RefusedError as refusal:
            raise RefusedError(f"rmmod: ERROR: {refusal}") from refusal


def lsmod(_words: list) -> None:
    if Path("/proc/modules").exists():
        sys.stdout.write(subprocess.check_output([real_tool("lsmod")], universal_newlines=True))
    else:  # the machine below has a kernel without modules
        print("Module                  Size  Used by")
    modules = loaded()
    for name, size in sorted((hardware()["driver"].get("foreign_modules") or {}).items()):
        print(f"{name:<19} {size:>8}  0")
    for name in sorted(modules):
        above = needed_by(name, modules)
        count = len(above) + used(name)
        print(f"{name:<19} {SIZES[name]:>8}  {count} {','.join(above)}".rstrip())


def modinfo(words: list) -> None:
    name = module_names(words)[0]
    module = installed()
    if module is None:
        raise RefusedError(f"modinfo: ERROR: Module {name} not found.")
    fields = {
        "filename": f"/lib/modules/gpuyard-lab/{name}.ko",
        "version": module["version"],
        "license": LICENSES[module["flavour"]],
        "depends": MODULES[name] or "",
        "name": name,
    }
    asked = re.search(r"(?:^| )(?:-F|--field)[ =]?(\w+)", " ".join(words))
    if asked:
        print(fields.get(asked.group(1), ""))
        return
    for field, value in fields.items():
        print(f"{field + ':':<16}{value}")


def apply() -> None:
    """Bring what is seen of the hardware, to NVML and in /proc and /dev, to what it is now."""
    with gpu_state.one_at_a_time(ROOT):
        gpu_state.write(ROOT, gpu_state.effective(ROOT))
        plug_in()
        if "nvidia" in loaded():
            show_driver(loaded()["nvidia"])


def boot() -> None:
    """What happens between power on and the first service: devices appear, the installed driver finds them."""
    proc = ROOT / "proc/driver"
    if not os.path.ismount(proc):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(proc)], check=True)
    apply()
    if "nvidia" not in loaded() and installed() and hardware()["gpus"]:
        for name in AT_BOOT:
            try:
                insert(name)
            except RefusedError as refusal:  # a machine boots without its driver
                print(f"modprobe: {refusal}", file=sys.stderr)


# --- engines -------------------------------------------------------------------------------------------------


def hold(engine: str) -> None:
    """Hold the GPUs for an engine of this lab, from its own control group, as the engine itself would hold real ones.

    Run by its unit when it serves. Also tells NVML what the engine takes of them: the memory that vLLM reserves, and
    the load, which is what its control group computes.
    """
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    minors = [
        minor for minor, _ in enumerate(hardware()["gpus"]) if visible in ([""], ["all"]) or str(minor) in visible
    ]
    if not minors or "nvidia" not in loaded():
        return  # what computes here without a driver needs none
    insert("nvidia_uvm")  # as CUDA has it loaded, by nvidia-modprobe, where nobody did before
    paths = [ROOT / "dev" / name for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{minor}" for minor in minors))]
    pid = int(os.environ["MAINPID"])
    if os.fork():
        return
    os.setsid()
    opened = [os.open(path, os.O_RDWR) for path in paths]
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    watch(pid, minors, taken_memory(engine, minors))
    for descriptor in opened:
        os.close(descriptor)
    os._exit(0)


def taken_memory(engine: str, minors: list) -> int:
    """MiB of each GPU. vLLM reserves nine tenths of it unless told otherwise."""
    share = 0.9
    with contextlib.suppress(OSError):
        settings = (ROOT / f"etc/vllm/{engine}.yaml").read_text()
        told = re.search(r"^gpu-memory-utilization: *([0-9.]+)", settings, re.MULTILINE)
        share = float(told.group(1)) if told else share
    return int(min(hardware()["gpus"][minor]["memory_mib"] for minor in minors) * share)


def watch(pid: int, minors: list, mib: int) -> None:
    """Say once a second what the process computes, until it is gone. NVML believes no file of a process that is not."""
    since = started(pid)
    file = ROOT / "run/gpuyard-lab/processes" / str(pid)
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.iterdir():
        if started(int(old.name.split(".")[0])) is None:
            old.unlink()
    before, at = computed(), time.monotonic()
    load = 0
    while since is not None and started(pid) == since:
        fresh = file.with_suffix(".new")
        fresh.write_text(f"{since} {mib} {load} {' '.join(map(str, minors))}\n")
        fresh.replace(file)
        time.sleep(1)
        now, then = computed(), time.monotonic()
        load = min(100, round((now - before) / (then - at) / (os.cpu_count() or 1) * 100))
        before, at = now, then
    with contextlib.suppress(FileNotFoundError):
        file.unlink()


def started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def computed() -> float:
    """Seconds of computing of all that is in this control group."""
    try:
        # A host may have trees of the first version beside it.
        group = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        stat = Path(f"/sys/fs/cgroup{group.group(1)}/cpu.stat").read_text() if group else ""
    except OSError:
        return 0.0
    usage = re.search(r"usage_usec (\d+)", stat)
    return int(usage.group(1)) / 1e6 if usage else 0.0


def real_tool(name: str) -> str:
    return shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") or f"/sbin/{name}"


def main(tool: str, words: list) -> int:
    if tool not in TOOLS:
        return by_its_own_name(words)
    if tool != "lsmod" and not module_names(words):
        os.execv(real_tool(tool), [tool, *words])  # noqa: S606 - the very words the caller gave the real tool
    try:
        TOOLS[tool](words)
    except RefusedError as refusal:
        if str(refusal):
            print(refusal, file=sys.stderr)
        return 1
    except gpu_state.StateError as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


def by_its_own_name(words: list) -> int:
    verbs = {("boot", 0): boot, ("apply", 0): apply, ("hold", 1): hold}
    verb = verbs.get((words[0], len(words) - 1)) if words else None
    if verb is None:
        print("usage: simulated_gpu.py boot | apply | hold ENGINE", file=sys.stderr)
        return 2
    try:
        verb(*words[1:])
    except (gpu_state.StateError, RefusedError) as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


TOOLS = {"modprobe": modprobe, "rmmod": rmmod, "lsmod": lsmod, "modinfo": modinfo}

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
