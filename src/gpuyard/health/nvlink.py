"""Where GPUs are linked by NVLink, every link is active and none has counted errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gpuyard.health import smi, tools
from gpuyard.health.smi import Finding, UnreadError
from gpuyard.health.thresholds import THRESHOLDS
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict

CHECK = "check_nvlink"

GPU = re.compile(r"GPU ([0-9]+): (?:.*\(UUID: (GPU-[0-9a-fA-F-]+)\))?")
LINK = re.compile(r"\s*Link ([0-9]+): (.+)")
ACTIVE = re.compile(r"[0-9.]+ GB/s")
INACTIVE = "<inactive>"
# Instead of a list of links where not one of a GPU is active.
NONE_ACTIVE = "all links are inactive"


class Said(NamedTuple):
    """What nvidia-smi said of a GPU's links: the number of each, and the text behind it."""

    lines: list[tuple[int, str]]
    none_active: bool

    @property
    def inactive(self) -> list[str]:
        return ["all"] if self.none_active else [str(link) for link, text in self.lines if text == INACTIVE]

    @property
    def active(self) -> list[int]:
        return [link for link, text in self.lines if ACTIVE.fullmatch(text)]


def probe(pci_root: str = tools.PCI_ROOT) -> Verdict:
    # -q -x does not tell of links.
    status = tools.ask("nvidia-smi", "nvlink", "--status")
    errors = tools.ask("nvidia-smi", "nvlink", "--errorcounters")
    switches = len(tools.pci_devices(pci_root, tools.NVSWITCH_CLASSES))
    return judge(smi.query(), status, errors, switches)


def judge(query: tools.Answer, status: tools.Answer, errors: tools.Answer, switches: int) -> Verdict:
    try:
        addresses = {gpu.text("uuid") or gpu.address: gpu.address for gpu in smi.gpus(query)}
        links = said(status, addresses)
        linked = switches > 0 or any(gpu.active for gpu in links.values())
        counters = said(errors, addresses) if linked else {}
        told = [
            Finding(state, f"GPU {address}: {words}")
            for address, of_gpu in links.items()
            for state, words in look(of_gpu, counters.get(address), switches, linked)
        ]
    except UnreadError as wrong:
        return Verdict(CHECK, UNHEALTHY, str(wrong))
    found = {
        "nvswitches": switches,
        "links": {
            address: {"active": len(of_gpu.active), "inactive": of_gpu.inactive} for address, of_gpu in links.items()
        },
    }
    if told:
        return Verdict(CHECK, UNHEALTHY, "; ".join(words for _, words in told), found)
    active = sum(len(of_gpu.active) for of_gpu in links.values())
    words = f"{active} NVLinks are active, without errors" if linked else "the GPUs are not linked by NVLink"
    return Verdict(CHECK, HEALTHY, words, found)


def said(answer: tools.Answer, addresses: Mapping[str, str]) -> dict[str, Said]:
    """By the address of the GPU. One that nvidia-smi says nothing of has no links.

    `addresses` are by UUID, in nvidia-smi's order: where it tells no UUID, the number says which GPU is meant.
    """
    if not answer.ok:
        raise UnreadError(f"nvidia-smi tells nothing of the NVLinks: {answer.text[:300]}")
    found = {address: Said([], False) for address in addresses.values()}
    address = ""
    for line in answer.text.splitlines():
        if gpu := GPU.match(line):
            number, uuid = int(gpu.group(1)), gpu.group(2)
            in_order = dict(enumerate(addresses.values()))
            known = in_order.get(number) if uuid is None else addresses.get(uuid)
            if known is None:
                raise UnreadError(f"nvidia-smi tells of the NVLinks of a GPU that it does not know: {line.strip()}")
            address = known
        elif link := LINK.fullmatch(line):
            found[address].lines.append((int(link.group(1)), link.group(2).strip()))
        elif NONE_ACTIVE in line.lower():
            found[address] = Said([], True)
        elif line.strip():
            raise UnreadError(f"nvidia-smi says of the NVLinks what is not known here: {line.strip()[:200]}")
    return found


def look(links: Said, counters: Said | None, switches: int, linked: bool) -> Iterator[Finding]:
    for link, text in links.lines:
        if text != INACTIVE and not ACTIVE.fullmatch(text):
            raise UnreadError(f"NVLink {link} is {text!r}, which is neither a speed nor {INACTIVE}")
    if switches and not links.active and not links.inactive:
        yield Finding(UNHEALTHY, f"it shows no NVLink, and there are {switches} NVSwitches")
    # Boards for a bridge that has not been put on are not linked at all, and are well.
    if linked and THRESHOLDS["nvlinks_inactive"].reached(len(links.inactive)):
        yield Finding(UNHEALTHY, f"NVLinks are inactive: {', '.join(links.inactive)}")
    counted: dict[int, dict[str, str]] = {link: {} for link in links.active}
    for link, text in counters.lines if counters else ():
        name, _, value = text.rpartition(": ")
        if link in counted and name in THRESHOLDS:
            counted[link][name] = value
    for link, values in counted.items():
        yield from errors_of(link, values)


def errors_of(link: int, values: Mapping[str, str]) -> Iterator[Finding]:
    if not values:
        raise UnreadError(f"NVLink {link} is active, and nvidia-smi shows no counter of its errors that is known here")
    for name, value in values.items():
        if not value.isdigit():
            raise UnreadError(f"NVLink {link}: {name} is {value!r}, which is no number")
        if THRESHOLDS[name].reached(int(value)):
            yield Finding(UNHEALTHY, f"NVLink {link} has counted {value} {name}")
