"""The settings of all engines as one set: kept aside, and put back exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from plugins.module_utils.engine_settings import (
    KEPT,
    SettingsError,
    engines,
    files,
    keep,
    refuse_other_models,
    restore,
)

DROP_IN = "[Service]\nEnvironment=GPUYARD_ENGINE=/opt/vllm/{engine}\nEnvironment=GPUYARD_MODEL=/m/{name}\n{port}"


def write(root: Path, name: str, text: str, mode: int = 0o644) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node with two engines."""
    write(tmp_path, "etc/systemd/system/vllm@.service", "[Unit]\n")
    for name, port in (("a", 8000), ("b", 8001)):
        conf = DROP_IN.format(engine="vllm-1", name=name, port=f"Environment=GPUYARD_PORT={port}\n")
        write(tmp_path, f"etc/systemd/system/vllm@{name}.service.d/gpuyard.conf", conf)
        write(tmp_path, f"etc/vllm/{name}.yaml", f"port: {port}\n")
        write(tmp_path, f"etc/vllm/credentials/{name}.key", "secret\n", 0o600)
    write(tmp_path, "etc/systemd/system/other.service", "not ours\n")
    return tmp_path


def look(root: Path) -> dict[str, tuple[str, int]]:
    return {str(path.relative_to(root)): (path.read_text(), path.stat().st_mode & 0o777) for path in files(root)}


def upgraded(root: Path) -> None:
    conf = root / "etc/systemd/system/vllm@a.service.d/gpuyard.conf"
    conf.write_text(conf.read_text().replace("vllm-1", "vllm-2"))
    write(root, "etc/vllm/a.yaml", "port: 8000\nseed: 1\n")
    write(root, "etc/vllm/new.env", "X=1\n")
    (root / "etc/vllm/b.yaml").unlink()


def test_what_a_node_serves_is_read_from_its_units(root: Path) -> None:
    assert engines(root) == {
        "a": {"environment": "vllm-1", "path": "/m/a", "port": 8000},
        "b": {"environment": "vllm-1", "path": "/m/b", "port": 8001},
    }
    write(root, "etc/systemd/system/vllm@a.service.d/gpuyard.conf", DROP_IN.format(engine="e", name="a", port=""))
    with pytest.raises(SettingsError, match="ENGINE-SETTINGS"):
        engines(root)


def test_all_is_put_back_exactly_and_twice_changes_nothing(root: Path) -> None:
    before = look(root)
    assert keep(root) is True
    assert keep(root) is False, "the same set is there already"
    upgraded(root)
    assert look(root) != before
    changed = restore(root)
    assert {Path(name).name for name in changed} == {"gpuyard.conf", "a.yaml", "b.yaml", "new.env"}
    assert look(root) == before
    assert restore(root) == []
    assert (root / "etc/systemd/system/other.service").read_text() == "not ours\n"


def test_keys_are_kept_where_nobody_else_reads_them(root: Path) -> None:
    keep(root)
    kept = root / KEPT
    assert kept.stat().st_mode & 0o777 == 0o700
    assert (kept / "etc/vllm/credentials/a.key").stat().st_mode & 0o777 == 0o600


def test_a_set_that_is_half_there_is_not_put_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="ENGINE-KEPT"):
        restore(root)

    def dies(*_: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", dies)
        with pytest.raises(OSError, match="no space"):
            keep(root)
    with pytest.raises(SettingsError, match="ENGINE-KEPT"):
        restore(root)
    keep(root)
    upgraded(root)
    now = look(root)
    (root / KEPT / "etc/vllm/a.yaml").write_text("port: 9\n")
    with pytest.raises(SettingsError, match=r"ENGINE-KEPT: /var/lib/gpuyard/engines-before/etc/vllm/a.yaml"):
        restore(root)
    assert look(root) == now, "nothing was put back of a set that is not whole"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"path": "/m/other"}, "for a this node serves /m/a on port 8000, and the lock says /m/other on port 8000"),
        ({"port": 9}, "on port 9"),
        ({"name": "c"}, "for a this node serves /m/a on port 8000, and the lock says nothing of that name"),
    ],
)
def test_more_than_another_engine_is_for_a_converge(root: Path, change: dict[str, Any], said: str) -> None:
    models = [{"name": "a", "path": "/m/a", "port": 8000, **change}, {"name": "b", "path": "/m/b", "port": 8001}]
    if not said:
        refuse_other_models(engines(root), models)
        return
    with pytest.raises(SettingsError, match="UPGRADE-MODELS") as refused:
        refuse_other_models(engines(root), models)
    assert said in str(refused.value)
