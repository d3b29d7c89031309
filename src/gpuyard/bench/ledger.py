"""The ledger: every request that was sent stands in it once, with how it ended."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

from gpuyard.bench.answers import Outcome


@dataclass(frozen=True, slots=True)
class Entry:
    """One request and its end."""

    id: int
    prompt: str
    kind: str
    begun: str
    """When it was sent, in UTC."""
    seconds: float
    ttft: float | None
    """Seconds to the first content; for a whole answer, to its first byte."""
    bytes: int
    sha256: str
    """Of the content, as UTF-8."""
    tokens: int | None
    finish: str | None
    answer: str | None
    """Id of the completion."""
    outcome: Outcome
    why: str


class TwiceError(Exception):
    """A request that had ended ended again: the client has a bug, and no count of it can be believed."""


class Ledger:
    """Books requests as they begin and end, and writes each line when it is known."""

    def __init__(self, file: TextIO | None, answered: Sequence[str] = ()) -> None:
        """`answered`: completions known from before. If two of them share an id, ids tell nothing here."""
        self.entries: list[Entry] = []
        self.counts = Counter[Outcome]()
        self._open: set[int] = set()
        self._ended: set[int] = set()
        self._file = file
        self._answered = set(answered)
        self._ids_tell = len(self._answered) == len(answered)

    def begin(self, number: int) -> None:
        if number in self._open | self._ended:
            raise TwiceError(f"request {number} began twice")
        self._open.add(number)

    def again(self, answer: str | None) -> bool:
        """Whether a completion that answers a request has answered another one before."""
        if not self._ids_tell or answer is None:
            return False
        seen = answer in self._answered
        self._answered.add(answer)
        return seen

    def end(self, entry: Entry) -> None:
        if entry.id not in self._open:
            raise TwiceError(f"request {entry.id} ended and was not open")
        self._open.remove(entry.id)
        self._ended.add(entry.id)
        self.entries.append(entry)
        self.counts[entry.outcome] += 1
        if self._file:
            self._file.write(json.dumps(asdict(entry)) + "\n")
            self._file.flush()

    @property
    def unended(self) -> int:
        return len(self._open)
