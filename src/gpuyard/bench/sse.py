"""Server-sent events, byte by byte, and strict: what a browser would skip in silence is an error here."""

from __future__ import annotations

from collections.abc import Iterator


class FramingError(ValueError):
    """The stream has not the form of server-sent events."""


class EventReader:
    """Turns pieces of a stream, cut anywhere, into the payloads of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        self._rest += piece
        # One after the other: between two events `pending` tells whether anything follows the first.
        while (end := self._rest.find(b"\n")) >= 0:
            line, self._rest = self._rest[:end], self._rest[end + 1 :]
            if (payload := self._line(line.removesuffix(b"\r"))) is not None:
                yield payload

    @property
    def pending(self) -> bool:
        """Whether bytes have come that were not yet told as an event."""
        return bool(self._rest or self._data)

    def _line(self, line: bytes) -> str | None:
        if not line:
            payload, self._data = "\n".join(self._data) if self._data else None, []
            return payload
        name, _, value = line.partition(b":")
        if name == b"data":
            try:
                self._data.append(value.removeprefix(b" ").decode())
            except UnicodeDecodeError as error:
                raise FramingError(f"an event is not UTF-8: {error}") from error
        # An empty name is a comment: engines send some so that a silent connection is kept.
        elif name not in (b"", b"event", b"id", b"retry"):
            raise FramingError(f"a line that is no field of an event: {line[:80]!r}")
        return None
