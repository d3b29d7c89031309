from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gpuyard.catalog import load_catalog
from gpuyard.plan.lock import Lock, LockError, NewerLockError, check_lock, load_lock, lock_path
from gpuyard.plan.moves import staying
from gpuyard.plan.resolve import PlanError, World, resolve
from gpuyard.spec.closed import digest_of
from gpuyard.spec.documents import read_document
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

PROJECT = Path(__file__).parents[2]
LAB = PROJECT / "fleets/lab.yaml"
SPECS = sorted(path for path in (PROJECT / "fleets").glob("*.yaml") if path.suffixes == [".yaml"])
PLANNED_ONLY = [path for path in SPECS if not lock_path(path).is_file()]
FLEETS = [path for path in SPECS if path not in PLANNED_ONLY]
DAY = "2026-11-25"
REQUIREMENTS = {"requirements/engine-cpu.txt": "a" * 64, "requirements/engine-cuda.txt": "b" * 64}


def make(fleet: Fleet) -> Lock:
    return resolve(fleet, World(load_catalog(), REQUIREMENTS, DAY))


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    path = tmp_path / "lab.lock.yaml"
    path.write_text(make(load_fleet(LAB)).to_yaml())
    return path


def test_a_lock_stands_beside_its_spec() -> None:
    assert lock_path(Path("fleets/lab.yaml")) == Path("fleets/lab.lock.yaml")


def test_what_was_written_is_read(lock_file: Path) -> None:
    lock = load_lock(lock_file)
    assert lock == make(load_fleet(LAB))
    assert lock.to_yaml() == lock_file.read_text()
    check_lock(lock, load_fleet(LAB))


def test_another_yaml_reader_sees_the_same_values(lock_file: Path) -> None:
    assert YAML(typ="rt").load(lock_file.read_text()) == load_lock(lock_file).plain()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("580.126.20-1", "580.105.08-1"),
        ("port: 8080", "port: 8081"),
        ("kernel_modules: open", "kernel_modules: proprietary"),
        ("a" * 64, "f" * 64),
        ("dtype: float32", "dtype: float16"),
        ("cuda_toolkit: null", "cuda_toolkit: ''"),
        ("drain_seconds: 60", "drain_seconds: 61"),
        ("max_body_mib: 8", "max_body_mib: 8\n  surprise: 1"),
        ("digest: sha256:", "digest: sha256:0"),
    ],
)
def test_a_hand_edit_is_refused(lock_file: Path, old: str, new: str) -> None:
    text = lock_file.read_text()
    assert old in text
    lock_file.write_text(text.replace(old, new))
    with pytest.raises(LockError) as refused:
        load_lock(lock_file)
    assert refused.value.rule == "LOCK-EDITED"


def test_comments_and_layout_are_no_edit(lock_file: Path) -> None:
    data = read_document(lock_file).data
    lock_file.write_text("# checked by me\n" + json.dumps(data))
    assert load_lock(lock_file) == make(load_fleet(LAB))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "LOCK-INVALID"),
        ("a: [", "LOCK-INVALID"),
        ("[]", "LOCK-VERSION"),
        ("version: 1\n", "LOCK-VERSION"),
        ("version: 2\n", "LOCK-EDITED"),
    ],
)
def test_what_is_no_lock_is_refused_in_one_line(lock_file: Path, text: str, rule: str) -> None:
    lock_file.write_text(text)
    with pytest.raises(LockError) as refused:
        load_lock(lock_file)
    assert refused.value.rule == rule
    assert "\n" not in str(refused.value)
    assert "gpuyard lock" in str(refused.value)


def test_a_lock_of_a_newer_gpuyard_is_refused_and_not_to_be_written_anew(lock_file: Path) -> None:
    lock_file.write_text("version: 3\n")
    with pytest.raises(NewerLockError) as refused:
        load_lock(lock_file)
    assert refused.value.rule == "LOCK-VERSION"
    assert "the gpuyard that wrote it" in refused.value.change


def test_a_lock_of_another_shape_is_refused_though_its_digest_is_right(lock_file: Path) -> None:
    data: Any = read_document(lock_file).data
    del data["gateway"], data["digest"]
    data["digest"] = digest_of(data)
    lock_file.write_text(json.dumps(data))
    with pytest.raises(LockError, match=r"LOCK-INVALID.*gateway"):
        load_lock(lock_file)


def test_no_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="LOCK-MISSING"):
        load_lock(tmp_path / "lab.lock.yaml")


def test_a_lock_of_an_older_spec_is_refused() -> None:
    fleet = load_fleet(LAB)
    newer = fleet.model_copy(update={"gateway": fleet.gateway.model_copy(update={"port": 9000})})
    with pytest.raises(LockError) as refused:
        check_lock(make(fleet), newer)
    assert refused.value.rule == "LOCK-STALE"


def test_a_lock_of_another_fleet_is_refused() -> None:
    fleet = load_fleet(LAB)
    with pytest.raises(LockError) as refused:
        check_lock(make(fleet), fleet.model_copy(update={"name": "other"}))
    assert refused.value.rule == "LOCK-FLEET"


@pytest.mark.parametrize("path", FLEETS, ids=lambda path: path.name)
def test_the_committed_locks_are_fresh(path: Path) -> None:
    requirements = {
        file.relative_to(PROJECT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in PROJECT.glob("requirements/*.txt")
    }
    lock = load_lock(lock_path(path))
    fresh = resolve(load_fleet(path), World(load_catalog(), requirements, DAY), staying(lock)).to_yaml()
    assert lock_path(path).read_text() == fresh, f"run `gpuyard lock {path.relative_to(PROJECT)}`"


def test_a_committed_fleet_without_a_lock_is_one_that_cannot_be_locked_yet() -> None:
    assert [path.name for path in PLANNED_ONLY] == ["prod.yaml"]
    world = World(load_catalog(), {"requirements/engine-cuda.txt": "0" * 64}, DAY)
    with pytest.raises(PlanError) as refused:
        resolve(load_fleet(PLANNED_ONLY[0]), world)
    assert {finding.rule for finding in refused.value.findings} == {"PLAN-MANIFEST"}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=6), st.randoms())
def test_a_digest_does_not_depend_on_the_order_of_keys(data: dict[str, object], random: Any) -> None:
    items = list(data.items())
    random.shuffle(items)
    assert digest_of(dict(items)) == digest_of(data)


@given(PLAIN, PLAIN)
def test_different_data_has_another_digest(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest_of(one) == digest_of(other)) is same


# Whatever an environment variable holds, the lock's file brings it back: "1e3", "null", "0x1", " # x", …
@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.from_regex(r"\AOMP_[A-Z0-9_]{0,8}\Z"), st.from_regex(r"\A[ -~]{0,40}\Z"), max_size=3))
def test_every_value_survives_the_file(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> None:
    fleet = load_fleet(LAB)
    model = fleet.models[0].model_copy(update={"env": env})
    lock = make(fleet.model_copy(update={"models": (model,)}))
    path = tmp_path_factory.getbasetemp() / "any.lock.yaml"
    path.write_text(lock.to_yaml())
    assert load_lock(path) == lock
