"""What nvidia-smi says of every GPU, asked once for all probes and read value by value.

`N/A` is the GPU's own word that it has no such value. A value that stands under none of its names, or that is anything
else, such as the text of an error, was not read, and what was not read is not health.
"""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gpuyard.health import tools
from gpuyard.health.gpu_count import short
from gpuyard.health.verdict import HEALTHY, UNHEALTHY, Verdict, worst

# The third is what newer drivers say of a field that another one has replaced.
NOT_THERE = ("N/A", "[N/A]", "Not Supported", "[Not Supported]", "Requested functionality has been deprecated")
NUMBER = re.compile(r"(-?[0-9]+)(?: ?(?:x|C))?")


class UnreadError(Exception):
    """A value that the GPU should have and that could not be read."""


class Finding(NamedTuple):
    state: str
    words: str


class Gpu:
    def __init__(self, element: ElementTree.Element) -> None:
        self.element = element
        self.address = short(element.get("id", "unknown"))
        self.read: dict[str, str] = {}
        """Every value that was asked for, for the verdict."""

    def text(self, *names: str) -> str | None:
        """The first of these fields that has a value; none where the GPU says that it has no such value."""
        said = [text for text in map(self._field, names) if text is not None]
        for text in said:
            if text not in NOT_THERE:
                self.read[names[0]] = text
                return text
        if not said:
            raise UnreadError(f"nvidia-smi does not show {' nor '.join(names)}")
        self.read[names[0]] = said[0]
        return None

    def number(self, *names: str) -> int | None:
        text = self.text(*names)
        if text is None:
            return None
        match = NUMBER.fullmatch(text)
        if match is None:
            raise UnreadError(f"{names[0]} is {text!r}, which is no number")
        return int(match.group(1))

    def flag(self, *names: str, yes: str = "Yes", no: str = "No") -> bool | None:
        text = self.text(*names)
        if text not in (yes, no, None):
            raise UnreadError(f"{names[0]} is {text!r}, which is neither {yes} nor {no}")
        return None if text is None else text == yes

    def shows(self, name: str) -> bool:
        return self._field(name) is not None

    def _field(self, name: str) -> str | None:
        """A whole group may be N/A, or the text of an error: then so is what would be in it."""
        element = self.element
        for step in name.split("/"):
            inner = element.find(step)
            if inner is None:
                return (element.text or "").strip() or None
            element = inner
        return (element.text or "").strip()


@functools.lru_cache(maxsize=1)
def query() -> tools.Answer:
    """Asked once in the life of this program, also where there was no answer: the other probes need not wait for it."""
    return tools.ask("nvidia-smi", "-q", "-x")


def gpus(answer: tools.Answer) -> list[Gpu]:
    # What it warns of stands before or behind, on the same screen.
    begin, end = answer.text.find("<nvidia_smi_log"), answer.text.find("</nvidia_smi_log>")
    if not answer.ok or begin < 0 or end < 0:
        raise UnreadError(f"nvidia-smi tells nothing of the GPUs: {answer.text[:300]}")
    try:
        log = ElementTree.fromstring(answer.text[begin : end + len("</nvidia_smi_log>")])  # noqa: S314 - nvidia-smi wrote it a moment ago
    except ElementTree.ParseError as wrong:
        raise UnreadError(f"what nvidia-smi tells of the GPUs is no XML: {wrong}") from None
    found = [Gpu(element) for element in log.findall("gpu")]
    attached = log.findtext("attached_gpus", "").strip()
    if not found or str(len(found)) != attached:
        raise UnreadError(f"nvidia-smi tells of {len(found)} GPUs, {attached or 'an unknown number'} are attached")
    return found


def judge(check: str, answer: tools.Answer, look: Callable[[Gpu], Iterable[Finding]], well: str) -> Verdict:
    """One verdict for all GPUs: the worst that was found on one of them, with the address of each that is not well."""
    try:
        asked = gpus(answer)
    except UnreadError as wrong:
        return Verdict(check, UNHEALTHY, str(wrong))
    told: list[Finding] = []
    for gpu in asked:
        try:
            told += [Finding(state, f"GPU {gpu.address}: {words}") for state, words in look(gpu)]
        except UnreadError as wrong:
            told.append(Finding(UNHEALTHY, f"GPU {gpu.address}: {wrong}"))
    found = {gpu.address: gpu.read for gpu in asked}
    if not told:
        return Verdict(check, HEALTHY, f"{len(asked)} GPUs: {well}", found)
    return Verdict(check, worst([HEALTHY, *(state for state, _ in told)]), "; ".join(words for _, words in told), found)
