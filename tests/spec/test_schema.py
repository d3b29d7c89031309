from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from gpuyard.spec.documents import read_document
from gpuyard.spec.schema import fleet_schema, fleet_schema_text

PROJECT = Path(__file__).parents[2]
FLEETS = sorted(path for path in (PROJECT / "fleets").glob("*.yaml") if path.suffixes == [".yaml"])


def test_the_schema_is_a_schema() -> None:
    Draft7Validator.check_schema(fleet_schema())


def test_the_committed_schema_is_fresh() -> None:
    committed = (PROJECT / "schemas/fleet.schema.json").read_text()
    assert committed == fleet_schema_text(), "run `gpuyard schema --output schemas/fleet.schema.json`"


def test_every_field_is_described_for_the_editor() -> None:
    bare = [
        f"{name}.{field}"
        for name, definition in fleet_schema()["definitions"].items()
        for field, schema in definition["properties"].items()
        if "description" not in schema
    ]
    assert bare == []


@pytest.mark.parametrize("path", FLEETS, ids=lambda path: path.name)
def test_every_fleet_names_its_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../schemas/fleet.schema.json"
    assert list(Draft7Validator(fleet_schema()).iter_errors(read_document(path).data)) == []


def test_the_editor_sees_an_unknown_key_a_wrong_word_and_a_wrong_variable() -> None:
    data = read_document(PROJECT / "fleets/lab.yaml").data
    text = json.dumps(data)
    for old, new in (('"nodes"', '"nods"'), ('"open"', '"opne"'), ('"VLLM_CPU_KVCACHE_SPACE"', '"lower"')):
        assert old in text
        assert list(Draft7Validator(fleet_schema()).iter_errors(json.loads(text.replace(old, new))))
