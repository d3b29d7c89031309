"""YAML files as plain data that knows its lines. Bounded, so that a small file cannot ask for much memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 32

_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}
_KEPT_AS_TEXT = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge"}


class DocumentError(Exception):
    """The file holds no usable document."""

    def __init__(self, line: int, found: str, allowed: str) -> None:
        self.line = line
        self.found = found
        self.allowed = allowed
        super().__init__(f"line {line}: {found}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Repeated:
    """A key that a mapping holds twice."""

    path: tuple[str | int, ...]
    line: int
    first_line: int


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data, the line of every value by its path, and keys that stand twice."""

    data: object
    lines: dict[tuple[str | int, ...], int]
    repeated: tuple[Repeated, ...]

    def line_of(self, path: tuple[str | int, ...]) -> int:
        """Line of the value, or of the nearest value around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_document(path: Path) -> Document:
    """Read one YAML document. Raises DocumentError, or OSError where the file cannot be read."""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise DocumentError(1, f"more than {MAX_BYTES // 1024} KiB", f"at most {MAX_BYTES // 1024} KiB")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DocumentError(line, "bytes that are not UTF-8", "UTF-8 text") from error
    yaml = YAML(typ="safe", pure=True)
    try:
        node = cast("Node | None", yaml.compose(text))  # pyright: ignore[reportUnknownMemberType]
    except MarkedYAMLError as error:
        raise _not_yaml(error) from error
    except (YAMLError, RecursionError, ValueError) as error:
        raise DocumentError(1, f"not YAML ({type(error).__name__})", "one YAML document") from error
    if node is None:
        raise DocumentError(1, "an empty file", "one YAML document")
    reader = _Reader(yaml)
    data = reader.value(node, ())
    return Document(data, reader.lines, tuple(reader.repeated))


@dataclass(slots=True)
class _Reader:
    yaml: YAML
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict[tuple[str | int, ...], int])
    repeated: list[Repeated] = field(default_factory=list[Repeated])

    def value(self, node: Node, path: tuple[str | int, ...]) -> object:
        line = _line(node)
        self.lines[path] = line
        # Aliases show up as the same node again, so what they expand to is counted, not what is written.
        if len(self.lines) > MAX_VALUES:
            raise DocumentError(line, f"more than {MAX_VALUES} values after aliases are expanded", "fewer values")
        if len(path) > MAX_DEPTH:
            raise DocumentError(line, f"values nested more than {MAX_DEPTH} deep", f"at most {MAX_DEPTH} levels")
        tag = str(cast("Any", node).tag)
        if tag not in _PLAIN_TAGS:
            raise DocumentError(line, f"the tag {tag[:60]!r}", "plain values without tags")
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            items = cast("list[Node]", _value(node))
            return [self.value(item, (*path, index)) for index, item in enumerate(items)]
        return self._scalar(node, tag)

    def _mapping(self, node: MappingNode, path: tuple[str | int, ...]) -> dict[str, object]:
        found: dict[str, object] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in cast("list[tuple[Node, Node]]", _value(node)):
            if not isinstance(key_node, ScalarNode):
                raise DocumentError(_line(key_node), "a key that is a list or a mapping", "keys that are words")
            key = str(_value(key_node))
            here = (*path, key)
            if key in found:
                self.repeated.append(Repeated(here, _line(key_node), first_lines[key]))
                continue
            first_lines[key] = _line(key_node)
            found[key] = self.value(value_node, here)
            # An unknown key is reported where it stands, and a long value may begin on a later line.
            self.lines[here] = _line(key_node)
        return found

    def _scalar(self, node: Node, tag: str) -> object:
        if tag in _KEPT_AS_TEXT:
            return str(_value(node))
        try:
            return cast("object", self.yaml.constructor.construct_object(node))  # pyright: ignore[reportUnknownMemberType]
        except (YAMLError, ValueError) as error:
            raise DocumentError(_line(node), f"the value {str(_value(node))[:40]!r}", "plain values") from error


# ruamel.yaml has no types for what its nodes and errors carry.
def _value(node: object) -> Any:
    return cast("Any", node).value


def _line(node: object) -> int:
    return int(cast("Any", node).start_mark.line) + 1


def _not_yaml(error: object) -> DocumentError:
    told = cast("Any", error)
    mark = told.problem_mark or told.context_mark
    problem = str(told.problem or told.context or "no YAML")
    return DocumentError(int(mark.line) + 1 if mark else 1, f"not YAML ({problem})", "one YAML document")
