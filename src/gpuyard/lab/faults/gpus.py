"""Faults of GPUs, of their driver and its daemons; the kernel's lines are worded as in the threads named as source."""

from __future__ import annotations

from typing import Any

from gpuyard.lab.faults.model import Fault, Injection, OnNode, Parameter, Probe, Step
from gpuyard.lab.faults.words import IN_HAND, UNLOADED, gpu_state, helper, kernel, logged

CATALOG = "docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html"
MEMORY = "docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt"
RECOVERY = ("None", "GPU Reset Required", "Node Reboot Required", "Drain P2P", "Drain and Reset")

# What follows the number, as the driver words it. A number that is not here comes without words, as one would that no
# reader knows.
WORDS = {
    13: "pid=4242, name=python3, Graphics Exception: ESR 0x505648=0x1000e 0x505650=0x24 0x505644=0xd3eff2",
    31: "pid=4242, name=python3, Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_0 faulted",
    43: "pid=4242, name=python3, Ch 00000008",
    45: "pid=4242, name=python3, Ch 00000008",
    48: "pid='<unknown>', name=<unknown>, An uncorrectable double bit error (DBE) has been detected on GPU in the "
    "framebuffer at physAddr 0xe9b9107e0 partition 3, subpartition 0.",
    63: "pid=4242, name=python3, Row Remapper: New row (0x0000000e9b9107e0) marked for remapping, reset gpu to "
    "activate.",
    64: "pid=4242, name=python3, Row Remapper: Row remapping failure.",
    74: "pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 4(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, "
    "0x0)",
    79: "pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    92: "pid='<unknown>', name=<unknown>, High single-bit ECC error rate",
    94: "pid=4242, name=python3, Contained: LTC TAG (0x2,0x0). RST: No, D-RST: No",
    95: "pid=4242, name=python3, Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No",
    109: "pid=4242, name=python3, Ch 00000008, errorString CTX SWITCH TIMEOUT, Info 0x4c003",
    119: "pid=4242, name=python3, Timeout after 6s of waiting for RPC response from GPU0 GSP! Expected function 76 "
    "(GSP_RM_CONTROL) (0x20802a02 0x8).",
    120: "pid=4242, name=python3, GSP task exception",
    140: "pid='<unknown>', name=<unknown>, An unrecovered ECC error has been detected",
    143: "pid='<unknown>', name=<unknown>, GPU initialization failure",
    149: "NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x025001c6 0x00000000 0x00000000 0x00000000 0x00000000 0x00000000)",
}


def xid_line(injection: Injection, code: int, words: str = "") -> str:
    said = words or WORDS.get(code, "")
    return f"NVRM: Xid (PCI:{injection.bdf[:-2]}): {code}" + (f", {said}" if said else "")


def recovery_line(injection: Injection, action: int) -> str:
    name = RECOVERY[action] if action < len(RECOVERY) else "Unknown"
    changed = f"GPU recovery action changed from 0x0 (None) to {action:#x} ({name})"
    return xid_line(injection, 154, changed)


def of_one(injection: Injection, **keys: Any) -> OnNode:
    return gpu_state(injection, {"gpus": {str(injection.gpu): keys}})


def smi(field: str, value: str) -> Probe:
    """What nvidia-smi says of the GPU in its line of values."""
    return Probe(f"nvidia-smi -i $gpu --query-gpu={field} --format=csv,noheader,nounits | grep -qix ' *{value}'")


BUS = "nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader | tr A-F a-f"


def details(what: str) -> Probe:
    """What nvidia-smi says of the GPU at length."""
    return Probe(f"nvidia-smi -q -i $gpu | grep -q '{what}'")


def xid(injection: Injection) -> tuple[Step, ...]:
    code = injection.whole("code")
    words = injection["words"]
    line = recovery_line(injection, 1) if code == 154 and not words else xid_line(injection, code, words)
    return (kernel(*[line] * injection.whole("times")),)


def thermal(injection: Injection) -> tuple[Step, ...]:
    celsius = injection.whole("celsius")
    return (of_one(injection, temperature_c=celsius, temperature_memory_c=celsius + 4, clocks_event_reasons=0x48),)


REASONS = {"power-cap": 0x4, "hw-slowdown": 0x8, "sw-thermal": 0x20, "hw-thermal": 0x40, "power-brake": 0x80}


def clocks(injection: Injection) -> tuple[Step, ...]:
    mhz = injection.whole("mhz")
    low = {"graphics": mhz, "sm": mhz}
    return (of_one(injection, clocks=low, clocks_event_reasons=REASONS[injection["reason"]] | 0x8),)


def ecc(injection: Injection) -> tuple[Step, ...]:
    count, where = injection.whole("count"), injection["memory"]
    counts = {age: {where: count} for age in ("volatile", "aggregate")}
    state = of_one(injection, ecc={injection["kind"]: counts})
    told = {"uncorrected": 48, "corrected": 92}[injection["kind"]]
    return (state, kernel(xid_line(injection, told)))


def nvlink(injection: Injection) -> tuple[Step, ...]:
    first = injection.whole("link")
    links = {str(first + n): {"state": "inactive"} for n in range(injection.whole("links"))}
    return (of_one(injection, nvlink=links), kernel(xid_line(injection, 74)))


def recovery(injection: Injection) -> tuple[Step, ...]:
    action = injection.whole("action")
    return (of_one(injection, recovery_action=action), kernel(recovery_line(injection, action)))


def init_fails(injection: Injection) -> tuple[Step, ...]:
    lines = (
        f"NVRM: GPU {injection.bdf}: RmInitAdapter failed! (0x62:0x65:1860)",
        f"NVRM: GPU {injection.bdf}: rm_init_adapter failed, device minor number {injection.gpu}",
    )
    return (of_one(injection, init_failed=True), kernel(*lines))


def not_loading(injection: Injection, text: str, *lines: str, **driver: Any) -> tuple[Step, ...]:
    """The module is taken out, and does not load again: as after a reboot."""
    patch = {"driver": {"load_error": text, **driver}}
    return (UNLOADED, gpu_state(injection, patch), kernel(*lines))


def load_says(text: str) -> Probe:
    return Probe(f"! grep -q . /proc/driver/nvidia/version 2>/dev/null && modprobe nvidia 2>&1 | grep -q '{text}'")


PEERMEM = "lsmod | grep -q '^nvidia_peermem '"


def no_module(_: Injection) -> tuple[Step, ...]:
    module = "/lib/modules/gpuyard-lab/nvidia.ko"
    away = f'[ ! -e {module} ] || mv {module} "$keep/nvidia.ko"'
    # A driver that was installed meanwhile has brought its own.
    back = f'[ ! -e "$keep/nvidia.ko" ] || [ -e {module} ] || mv "$keep/nvidia.ko" {module}'
    return (UNLOADED, OnNode(away, back))


def in_use(injection: Injection) -> tuple[Step, ...]:
    name = injection["program"]
    program = (
        'python3 -c \'import sys, time\nopen("/proc/self/comm", "w").write(sys.argv[2])\n'
        "held = open(sys.argv[1])\ntime.sleep(10**8)' "
    )
    device = f"/dev/nvidia{injection.gpu}"
    ready = f"ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q -- '-> {device}$' && pgrep -x {name[:15]} >/dev/null"
    return (helper(injection, f"{program} {device} {name}", ready),)


def stop_hangs(injection: Injection) -> tuple[Step, ...]:
    folder = "/etc/systemd/system/nvidia-persistenced.service.d"
    hang = f"[Service]\\nExecStop=/bin/sleep infinity\\nTimeoutStopSec={injection['seconds']}\\n"
    unit = "nvidia-persistenced.service"
    return (
        OnNode(
            f'systemctl is-active --quiet {unit} && touch "$keep/active"\n'
            f"mkdir -p {folder}\nprintf '{hang}' >{folder}/gpuyard-lab-fault.conf\nsystemctl daemon-reload",
            f"rm -f {folder}/gpuyard-lab-fault.conf\n[ ! -d {folder} ] || rmdir --ignore-fail-on-non-empty {folder}\n"
            f"systemctl daemon-reload\n"
            f"case $(systemctl show -p ActiveState --value {unit}) in deactivating)\n"
            f"  systemctl kill -s KILL --kill-who=all {unit} ;;\nesac\n"
            f'[ ! -e "$keep/active" ] || {IN_HAND} || systemctl start {unit}',
        ),
    )


FAULTS = (
    Fault(
        "xid",
        "a line `NVRM: Xid …` of any number in the kernel's log, and nothing else",
        f"{CATALOG}; leptonai/gpud#1174",
        ("F14", "F27"),
        xid,
        lambda injection: Probe(logged(f"NVRM: Xid (PCI:{injection.bdf[:-2]}): {injection['code']}\\(,\\|$\\)")),
        (
            Parameter("code", "the number", "79", between=(1, 9999)),
            Parameter("words", "what follows it; without, the driver's own words", ""),
            Parameter("times", "how often", "1", between=(1, 100)),
        ),
        of_gpu=True,
    ),
    Fault(
        "gpu-lost",
        "a GPU that has fallen off the bus: Xid 79, and every question about it fails",
        f"{CATALOG}; NVIDIA/NVSentinel#155",
        ("F27",),
        lambda injection: (of_one(injection, lost=True), kernel(xid_line(injection, 79))),
        lambda _: Probe("nvidia-smi -i $gpu 2>&1 | grep -q 'GPU is lost'"),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "gpu-missing",
        "a GPU that is not on the bus after a reboot: eight become seven",
        "Azure/azurehpc-health-checks (GPU count check)",
        ("F22",),
        lambda injection: (of_one(injection, present=False),),
        lambda injection: Probe(f"! {BUS} | grep -q {injection.bdf}"),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "gpu-init-fails",
        "RmInitAdapter failed: on the bus and in /dev, and NVML does not count it",
        "NVIDIA/open-gpu-kernel-modules#789, #673, #326; NVIDIA/gpu-operator#649",
        ("F15",),
        init_fails,
        lambda injection: Probe(
            f"! {BUS} | grep -q {injection.bdf} && " + logged(f"GPU {injection.bdf}: RmInitAdapter failed!")
        ),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "gpu-hot",
        "a GPU above its slowdown temperature, its clocks lowered by hardware",
        "modal.com/blog/gpu-health (H100s at 94 °C)",
        ("F30",),
        thermal,
        lambda injection: smi("temperature.gpu", injection["celsius"]),
        (Parameter("celsius", "temperature of the GPU", "94", between=(0, 120)),),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "clocks-low",
        "clocks held down, with the reason that NVML gives",
        "Azure/azurehpc-health-checks (throttle reasons); leptonai/gpud (HW slowdown)",
        ("F30",),
        clocks,
        lambda injection: smi("clocks_event_reasons.active", f"0x{REASONS[injection['reason']] | 8:016x}"),
        (
            Parameter("reason", "why", "power-brake", among=tuple(REASONS)),
            Parameter("mhz", "what is left", "345", between=(1, 3000)),
        ),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "ecc",
        "ECC errors that the counters and the kernel's log tell of",
        f"{MEMORY}; {CATALOG}",
        ("F27", "F29"),
        ecc,
        lambda injection: smi(f"ecc.errors.{injection['kind']}.volatile.{injection['memory']}", injection["count"]),
        (
            Parameter(
                "kind", "whether the memory could correct them", "uncorrected", among=("corrected", "uncorrected")
            ),
            Parameter("memory", "where", "sram", among=("sram", "dram")),
            Parameter("count", "how many", "1", between=(1, 100_000_000)),
        ),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "remap-pending",
        "a row of memory is to be remapped at the next reset: Xid 63",
        f"{MEMORY}; leptonai/gpud#987",
        ("F27", "F29"),
        lambda injection: (
            of_one(injection, remapped_rows={"uncorrectable": 1, "pending": True}),
            kernel(xid_line(injection, 63)),
        ),
        lambda _: details("Pending  *: Yes"),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "remap-failure",
        "a row of memory could not be remapped: Xid 64, a reason to return the GPU",
        f"{MEMORY}; awslabs/awsome-distributed-ai#1190",
        ("F27", "F29"),
        lambda injection: (
            of_one(injection, remapped_rows={"uncorrectable": 8, "failure": True}),
            kernel(xid_line(injection, 64)),
        ),
        lambda _: details("Remapping Failure Occurred  *: Yes"),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "nvlink-down",
        "NVLinks that are inactive, with Xid 74",
        f"{CATALOG}; NVIDIA/NVSentinel#364",
        ("F27", "F32"),
        nvlink,
        lambda injection: Probe(f"nvidia-smi nvlink -s -i $gpu | grep -q 'Link {injection['link']}: <inactive>'"),
        (
            Parameter("link", "the first of them", "0", between=(0, 17)),
            Parameter("links", "how many", "1", between=(1, 18)),
        ),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "pcie-narrow",
        "a PCIe link with fewer lanes than it has, and replays",
        "DCGM_LIMIT_MAX_PCIREPLAY_RATE (8/min)",
        ("F30",),
        lambda injection: (of_one(injection, pcie={"width": injection.whole("width"), "replays": 64}),),
        lambda injection: smi("pcie.link.width.current", injection["width"]),
        (Parameter("width", "lanes that are left", "8", among=("1", "2", "4", "8")),),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "recovery-action",
        "the driver asks for an action: NVML's recovery action, and Xid 154",
        f"{MEMORY}/error-recovery-and-response-flags.html",
        ("F27",),
        recovery,
        # No nvidia-smi before branch 570 knows the action; who asks NVML gets it, and the kernel has said it.
        lambda _: Probe(logged("154, GPU recovery action changed")),
        (Parameter("action", "nvmlDeviceGpuRecoveryAction_t; 99 is one that nobody knows", "1", between=(1, 99)),),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "nvml-hangs",
        "nvidia-smi and whoever else asks NVML gets no answer, and monitoring hangs with it",
        "leptonai/gpud#117; NVIDIA/open-gpu-kernel-modules#971",
        ("F13",),
        lambda injection: (of_one(injection, nvml={injection["function"]: "hang"}),),
        lambda _: Probe("timeout -k 1 2 nvidia-smi -q -i $gpu >/dev/null 2>&1; [ $? = 124 ]"),
        (Parameter("function", "the function of NVML, or * for all", "*", like=r"\*|nvml\w+"),),
        needs=("gpus",),
        of_gpu=True,
    ),
    Fault(
        "nvml-fails",
        "a function of NVML ends with an error",
        "NVIDIA/go-nvml, nvml.h (nvmlReturn_t)",
        ("F15", "F29"),
        lambda injection: (of_one(injection, nvml={injection["function"]: injection.whole("code")}),),
        lambda _: Probe("! nvidia-smi -q -i $gpu >/dev/null 2>&1"),
        (
            Parameter("function", "the function of NVML, or * for all", "*", like=r"\*|nvml\w+"),
            Parameter("code", "nvmlReturn_t", "999", between=(1, 999)),
        ),
        needs=("gpus",),
        of_gpu=True,
    ),
    # --- the driver and its daemons -----------------------------------------------------------------------
    Fault(
        "secure-boot",
        "the kernel refuses the module's signature",
        "linux-surface/linux-surface#906; NVIDIA/gpu-driver-container#44",
        ("F09",),
        lambda injection: not_loading(
            injection, "Key was rejected by service", "Loading of module with unavailable key is rejected"
        ),
        lambda _: load_says("Key was rejected by service"),
        needs=("driver",),
    ),
    Fault(
        "modprobe-hangs",
        "the module is being loaded, and whoever loads it does not come back",
        "CachyOS/linux-cachyos#823; pop-os/system76-power#448",
        ("F15",),
        lambda injection: not_loading(injection, "hang"),
        lambda _: Probe(
            "! grep -q . /proc/driver/nvidia/version 2>/dev/null && { timeout 2 modprobe nvidia; [ $? -eq 124 ]; }"
        ),
        needs=("driver",),
    ),
    Fault(
        "gpu-not-supported",
        "the driver does not know the GPU: a wrong flavour, or a release that left it out",
        "NVIDIA/nvtrust#55; NVIDIA/open-gpu-kernel-modules#862",
        ("F16",),
        lambda injection: not_loading(
            injection,
            "No such device",
            f"NVRM: The NVIDIA GPU {injection.bdf} installed in this system is not supported by this driver release.",
            "NVRM: None of the NVIDIA devices were initialized.",
        ),
        lambda _: load_says("No such device"),
        needs=("driver",),
    ),
    Fault(
        "nouveau",
        "nouveau has the GPU, so the driver does not get it",
        "mattshma/bigdata#133",
        ("F19",),
        lambda injection: not_loading(
            injection,
            "No such device",
            f"NVRM: GPU {injection.bdf} is already bound to nouveau.",
            foreign_modules={"nouveau": 2564096},
        ),
        lambda _: Probe("lsmod | grep -q '^nouveau '"),
        needs=("driver",),
    ),
    Fault(
        "kernel-without-module",
        "a new kernel after a reboot, for which nobody built the module",
        "NVIDIA/nvidia-docker#804; GoogleCloudPlatform/compute-gpu-installation#10",
        ("F04",),
        no_module,
        lambda _: Probe("modprobe nvidia 2>&1 | grep -q 'Module nvidia not found in directory'"),
        needs=("driver",),
    ),
    Fault(
        "peermem-refused",
        "nvidia_peermem does not load: driver and network stack came in the wrong order",
        "NVIDIA/gpu-operator#2844; Mellanox/nv_peer_memory#116",
        ("F17",),
        lambda injection: (
            OnNode(
                f'{PEERMEM} && touch "$keep/loaded"; rmmod nvidia_peermem 2>/dev/null || true',
                '[ ! -e "$keep/loaded" ] || modprobe nvidia_peermem',
            ),
            gpu_state(injection, {"driver": {"modules_refused": {"nvidia_peermem": "Invalid argument"}}}),
        ),
        lambda _: Probe(
            f"{PEERMEM} || trap 'rmmod nvidia_peermem 2>/dev/null' EXIT\n"
            "modprobe nvidia_peermem 2>&1 | grep -q 'Invalid argument'"
        ),
        needs=("driver",),
    ),
    Fault(
        "module-in-use",
        "a process that no service manager of ours knows holds the GPU",
        "NVIDIA/gpu-operator#2509; NVIDIA/nvidia-docker#1242",
        ("F11",),
        in_use,
        lambda injection: Probe(
            f"pgrep -x {injection['program'][:15]} >/dev/null && lsmod | awk '$1 == \"nvidia\" {{exit $3 == 0}}'"
        ),
        (Parameter("program", "what it calls itself", "dcgm-exporter", among=("dcgm-exporter", "nv-hostengine")),),
        needs=("driver",),
        of_gpu=True,
    ),
    Fault(
        "persistenced-stop-hangs",
        "the persistence daemon does not stop, and holds up whoever stops it",
        "NVIDIA/nvidia-persistenced#15",
        ("F12",),
        stop_hangs,
        lambda _: Probe("systemctl show -p ExecStop nvidia-persistenced.service | grep -q 'sleep infinity'"),
        (Parameter("seconds", "until systemd kills it", "90", between=(1, 600)),),
        needs=("persistenced",),
    ),
    Fault(
        "fabricmanager-dead",
        "the fabric manager has died and does not come back",
        "NVIDIA/gpu-operator#544",
        ("F32",),
        lambda _: (
            OnNode(
                "systemctl mask --runtime --now nvidia-fabricmanager.service 2>/dev/null\n"
                "systemctl kill -s KILL nvidia-fabricmanager.service 2>/dev/null || true",
                "systemctl unmask --runtime nvidia-fabricmanager.service 2>/dev/null\n"
                "systemctl reset-failed nvidia-fabricmanager.service 2>/dev/null || true\n"
                f"{IN_HAND} || systemctl start nvidia-fabricmanager.service",
            ),
        ),
        lambda _: Probe("! systemctl is-active --quiet nvidia-fabricmanager.service"),
        needs=("fabric manager",),
    ),
)
