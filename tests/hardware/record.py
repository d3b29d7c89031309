#!/usr/bin/python3
"""What a host's GPU layer shows of itself, without saying whose host it is.

    record.py take              print a record of this host: a JSON object of surfaces and their texts
    record.py compare A B       print what record A has and record B lacks, and the other way round; 1 if they differ

Taken on real hardware a record is a fixture: what the lab simulates is held against it. Taken on a node of the lab it
is the other half of that comparison. Serial numbers, UUIDs, addresses and names are replaced before anything is
printed, the same by the same, so that what belongs together still does.

Needs Python 3.9 or later and its standard library. NVML is read where `pynvml` is there.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMANDS = {
    "nvidia-smi": ["nvidia-smi"],
    "nvidia-smi -L": ["nvidia-smi", "-L"],
    "nvidia-smi -q -x": ["nvidia-smi", "-q", "-x"],
    "nvidia-smi topo -m": ["nvidia-smi", "topo", "-m"],
    "nvidia-smi nvlink -s": ["nvidia-smi", "nvlink", "-s"],
    "lsmod": ["lsmod"],
    "modinfo nvidia": ["modinfo", "nvidia"],
    "engine log": ["journalctl", "--no-pager", "--output=cat", "--boot", "--unit=vllm@*"],
}
FILES = ("/proc/driver/nvidia/**/*", "/proc/devices", "/sys/module/nvidia*/refcnt")
# Asked of each GPU; what a board or a driver does not know answers with its error, and that is part of the record.
NVML = (
    *("Name", "Brand", "Architecture", "CudaComputeCapability", "MemoryInfo", "BAR1MemoryInfo", "PciInfo", "EccMode"),
    *("TotalEccErrors", "RemappedRows", "Temperature", "PowerUsage", "PowerManagementLimit", "PerformanceState"),
    *(
        "CurrentClocksEventReasons",
        "UtilizationRates",
        "MaxPcieLinkGeneration",
        "CurrPcieLinkWidth",
        "PcieReplayCounter",
    ),
    *("ComputeMode", "PersistenceMode", "MigMode", "GpuFabricInfo", "GpuOperationMode", "MinorNumber"),
)
MORE = {"TotalEccErrors": (1, 0), "Temperature": (0,)}

SECONDS = 120
LINES = 500  # of a log: how an engine starts, not how it goes on
OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"  # with it, 13.580.126.20 is a version and no address
SHAPES = {
    "uuid": re.compile(r"(?i)\b(?:GPU-|MIG-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
    "serial": re.compile(r"(?i)(?<=<serial>)[^<]+|(?<=<module_serial>)[^<]+|(?<=serial number)\s*:\s*\S+"),
    "mac": re.compile(r"(?i)\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b"),
    "guid": re.compile(r"(?i)\b0x[0-9a-f]{16}\b"),
    "address": re.compile(rf"(?<![\d.])(?!127\.0\.0\.1\b|0\.0\.0\.0\b){OCTET}(?:\.{OCTET}){{3}}(?![\d.])"),
    "home": re.compile(r"(?<=/home/)[^/\s\"']+"),
}


# --- taking ----------------------------------------------------------------------------------------------------------


def take() -> dict[str, str]:
    record = {name: said(command) for name, command in COMMANDS.items()}
    record["engine log"] = "".join(record["engine log"].splitlines(keepends=True)[:LINES])
    for pattern in FILES:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            if path.is_file():
                record[str(path)] = read(path)
    record["nvml"] = nvml()
    return redacted(record, {socket.gethostname(), socket.getfqdn()})


def said(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as wrong:
        return f"no answer: {wrong}"
    text = done.stdout.decode(errors="replace")
    return text if done.returncode == 0 else f"{text}\n(exit status {done.returncode})"


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as wrong:
        return f"not readable: {wrong.strerror}"


def nvml() -> str:
    """One line for each value of each GPU, as `nvidia-ml-py` gives it."""
    try:
        import pynvml
    except ImportError:
        return "no answer: pynvml is not installed for this Python"
    lines = []
    try:
        pynvml.nvmlInit()
        lines.append(f"driver {pynvml.nvmlSystemGetDriverVersion()}, NVML {pynvml.nvmlSystemGetNVMLVersion()}")
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            for name in NVML:
                try:
                    value = getattr(pynvml, f"nvmlDeviceGet{name}")(gpu, *MORE.get(name, ()))
                except (AttributeError, TypeError, pynvml.NVMLError) as wrong:
                    value = f"{type(wrong).__name__}: {wrong}"
                lines.append(f"{index} {name}: {' '.join(str(value).split())}")
    except pynvml.NVMLError as wrong:
        lines.append(f"no answer: {wrong}")
    return "\n".join(lines)


# --- redacting -------------------------------------------------------------------------------------------------------


def redacted(record: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """Each identifier becomes its kind and a number, the same in every text of the record."""
    known: dict[str, str] = {}

    def stand_in(kind: str, text: str) -> str:
        count = sum(word.startswith(f"{kind}-") for word in known.values())
        return known.setdefault(text.strip(" \t:").lower(), f"{kind}-{count + 1}")

    hosts = [re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])") for name in sorted(names, key=len, reverse=True)]
    texts = {}
    for place, text in record.items():
        for host in hosts:
            text = host.sub("host", text)
        for kind, shape in SHAPES.items():
            text = shape.sub(lambda match, kind=kind: kept(match.group()) + stand_in(kind, match.group()), text)
        texts[place] = text
    return texts


def kept(text: str) -> str:
    """The colon and the blanks between a label and its value."""
    return text[: len(text) - len(text.lstrip(" \t:"))]


# --- comparing -------------------------------------------------------------------------------------------------------


def fields(place: str, text: str) -> set[str]:
    """What a text has places for. Their values differ from host to host, and are not compared."""
    if text.startswith("no answer") or "(exit status " in text:
        return set()
    if place.endswith("-q -x"):
        return elements(text)
    if place == "/proc/devices":
        return {line.split()[1] for line in text.splitlines() if "nvidia" in line}
    if place == "lsmod":
        return {line.split()[0] for line in text.splitlines() if line.startswith("nvidia")}
    if place == "nvml":
        return {line.split()[1].rstrip(":") for line in text.splitlines()[1:] if "NVMLError" not in line}
    if place.startswith("/proc/driver/nvidia/") or place == "modinfo nvidia":
        return {line.split(":")[0].strip() for line in text.splitlines() if ":" in line}
    return set()


def elements(text: str) -> set[str]:
    """The paths of an XML document's elements; `gpu[3]` counts as `gpu`."""
    found: set[str] = set()

    def walk(element: ElementTree.Element, above: str) -> None:
        path = f"{above}/{element.tag}"
        found.add(path)
        for child in element:
            walk(child, path)

    try:
        walk(ElementTree.fromstring(text), "")  # noqa: S314 - written by nvidia-smi on a host of ours
    except ElementTree.ParseError:
        return set()
    return found


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """For each surface of either record, the fields that only one of them has. A GPU's address is not part of it."""

    def merged(record: Mapping[str, str]) -> dict[str, set[str]]:
        all_fields: dict[str, set[str]] = {}
        for place, text in record.items():
            general = re.sub(r"/gpus/[^/]+/", "/gpus/*/", place)
            all_fields.setdefault(general, set()).update(fields(place, text))
        return all_fields

    first, second = merged(one), merged(other)
    found = {}
    for place in sorted({*first, *second}):
        left, right = first.get(place, set()), second.get(place, set())
        if left != right:
            found[place] = {"only in the first": sorted(left - right), "only in the second": sorted(right - left)}
    return found


def main(words: Sequence[str]) -> int:
    if list(words) == ["take"]:
        print(json.dumps(take(), indent=1))
        return 0
    if len(words) == 3 and words[0] == "compare":
        found = difference(*(json.loads(Path(name).read_text()) for name in words[1:]))
        print(json.dumps(found, indent=1))
        return 1 if found else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
