"""The JSON Schema of a document, for editors, and what it says about one place, for messages."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

from pydantic import BaseModel

from gpuyard.spec.fleet import Fleet
from gpuyard.spec.rules import Path

_KINDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "nothing",
}


@cache
def schema_of(document: type[BaseModel]) -> Schema:
    """Draft-07, which is what yaml-language-server reads."""
    schema = document.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    return Schema(
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **_draft_07(schema),
            "definitions": _draft_07(definitions),
        }
    )


def fleet_schema() -> dict[str, Any]:
    return schema_of(Fleet).root


def fleet_schema_text() -> str:
    """The committed file's text."""
    return json.dumps(fleet_schema(), indent=2, ensure_ascii=False) + "\n"


class Schema:
    """The schema of one kind of document, and what it says about one place in it."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root

    def fields_at(self, path: Path) -> list[str]:
        """Keys that the mapping at this place may have."""
        return list(self._at(path).get("properties", {}))

    def allowed_at(self, path: Path) -> str:
        """What may stand at this place, in words."""
        found = self._at(path)
        words = self._words(found)
        described = str(found.get("description", "")).split("\n")[0].rstrip(".")
        return f"{words} ({described})" if described else words

    def choices_at(self, path: Path) -> list[str]:
        """The words of which one may stand at this place; empty where it is no choice."""
        found = self._at(path)
        words: list[object] = []
        for choice in (found, *found.get("anyOf", [])):
            words += choice.get("enum", [choice["const"]] if "const" in choice else [])
        return [str(word) for word in words]

    def _words(self, schema: dict[str, Any]) -> str:
        schema = self._resolved(schema)
        choices: list[dict[str, Any]] = [self._resolved(choice) for choice in schema.get("anyOf", [])]
        if choices:
            return " or ".join(self._words(choice) for choice in choices)
        if "const" in schema:
            return str(schema["const"])
        if "enum" in schema:
            return f"one of {', '.join(str(word) for word in schema['enum'])}"
        words = _KINDS.get(str(schema.get("type")), "a value")
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None:
            words += f" from {low} to {high}" if high is not None else f", {low} or more"
        elif high is not None:
            words += f" above {schema.get('exclusiveMinimum')} and up to {high}"
        if "pattern" in schema:
            words += f" that matches {schema['pattern']}"
        if schema.get("minItems"):
            words += f" of {schema['minItems']} to {schema.get('maxItems')}"
        if "properties" in schema:
            words += f" with the keys {', '.join(schema['properties'])}"
        return words

    def _at(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = self._resolved(self.root)
        for part in path:
            properties: dict[str, Any] = found.get("properties", {})
            if part == "[key]":
                found = self._any_key(found)
            elif isinstance(part, int):
                found = self._resolved(found.get("items", {}))
            elif part in properties:
                found = self._resolved(properties[part])
            else:
                found = self._value_of_any_key(found)
        return found

    def _any_key(self, schema: dict[str, Any]) -> dict[str, Any]:
        patterns: dict[str, Any] = schema.get("patternProperties", {})
        return {"type": "string", "pattern": " or ".join(patterns)}

    def _value_of_any_key(self, schema: dict[str, Any]) -> dict[str, Any]:
        for value in (*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")):
            if isinstance(value, dict):
                return self._resolved(cast("dict[str, Any]", value))
        return {}

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema with its reference followed; its own words win over those of what it refers to."""
        reference = schema.get("$ref") or next((part.get("$ref") for part in schema.get("allOf", [])), None)
        if reference is None:
            return schema
        name = str(reference).rsplit("/", 1)[-1]
        target = cast("dict[str, Any]", self.root["definitions"][name])
        return {**target, **{key: value for key, value in schema.items() if key not in ("$ref", "allOf")}}


def _draft_07(value: Any) -> Any:
    # Draft-07 ignores whatever stands beside $ref, so the description would be lost there.
    if isinstance(value, dict):
        found = {str(key): _draft_07(item) for key, item in cast("dict[str, Any]", value).items()}
        if "$ref" in found and len(found) > 1:
            found["allOf"] = [{"$ref": found.pop("$ref")}]
        if "patternProperties" in found:
            found["additionalProperties"] = False
        return found
    if isinstance(value, list):
        return [_draft_07(item) for item in cast("list[Any]", value)]
    return value
