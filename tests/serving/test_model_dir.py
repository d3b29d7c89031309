"""A model gets its name on a node after every byte was compared, and never before."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from plugins.module_utils.model_verify import ModelError
from plugins.modules import model_dir
from tests.serving.conftest import MODEL_FILES, Store


def keep(store: Store, root: Path, digest: str, check_mode: bool = False, **more: Any) -> dict[str, Any]:
    """One run of the module."""
    arguments = {
        "name": "tiny",
        "uri": store.uri,
        "manifest_sha256": digest,
        "root": str(root),
        "keep": 2,
        "references": [],
        "full_check": False,
        "locked": [],
        "budget_gib": 0,
        "shared": "",
        "shared_seconds": 30,
        "shared_wait_seconds": 60,
        "read_ahead": False,
        **more,
    }
    return model_dir.store_model(arguments, check_mode)


def refusal(store: Store, root: Path, digest: str, **more: Any) -> ModelError:
    with pytest.raises(ModelError) as refused:
        keep(store, root, digest, **more)
    return refused.value


def names(root: Path) -> list[str]:
    """What could be taken for a model."""
    return sorted(path.name for path in (root / "tiny").iterdir() if not path.name.startswith("."))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_a_model_is_fetched_once(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    first = keep(store, root, digest)
    assert (first["changed"], first["fetched"]) == (True, len(MODEL_FILES))
    assert first["path"] == str(root / "tiny" / digest[:12])
    for name, text in MODEL_FILES.items():
        assert (Path(first["path"]) / name).read_text() == text
        assert (Path(first["path"]) / name).stat().st_mode & 0o777 == 0o644
    store.server.shutdown()
    again = keep(store, root, digest)
    assert (again["changed"], again["fetched"]) == (False, 0)


def test_a_check_run_writes_nothing_and_says_that_it_would(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    assert keep(store, root, digest, check_mode=True)["changed"] is True
    assert list(root.iterdir()) == []


def test_what_a_killed_run_left_is_believed_only_after_it_was_read(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    staging = root / "tiny" / f".{digest[:12]}.partial"
    staging.mkdir(parents=True)
    whole, cut = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (staging / whole).write_text(MODEL_FILES[whole])
    (staging / cut).write_text(MODEL_FILES[cut][:-1])
    (staging / f"{cut}.part").write_text("rest")
    (staging / "stranger").write_text("x")
    done = keep(store, root, digest)
    assert done["fetched"] == len(MODEL_FILES) - 1
    assert (Path(done["path"]) / cut).read_text() == MODEL_FILES[cut]
    assert not list(Path(done["path"]).rglob("stranger"))
    assert not staging.exists()


def test_a_store_with_another_version_than_the_locked_one_is_refused(store: Store, root: Path) -> None:
    store.put("tiny", MODEL_FILES)
    found = refusal(store, root, "f" * 64)
    assert found.rule == "MODEL-LOCK"
    assert "f" * 64 in str(found)
    assert list(root.iterdir()) == []


def test_a_store_with_a_flipped_byte_is_refused_and_nothing_gets_the_name(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    (store.folder / "tiny/model-00001-of-00002.safetensors").write_text("ONE" * 1000)
    found = refusal(store, root, digest)
    assert found.rule == "MODEL-HASH"
    assert "model-00001-of-00002.safetensors" in str(found)
    assert names(root) == []


@pytest.mark.parametrize(
    ("extra", "rule"),
    [("pytorch_model.bin", "MODEL-PICKLE"), ("modeling.py", "MODEL-REMOTE-CODE")],
)
def test_a_store_that_offers_code_is_refused_before_a_file_is_fetched(
    store: Store, root: Path, extra: str, rule: str
) -> None:
    digest = store.put("tiny", {**MODEL_FILES, extra: "x"})
    assert refusal(store, root, digest).rule == rule
    assert list(root.iterdir()) == []


def test_a_model_that_asks_for_code_gets_no_name(store: Store, root: Path) -> None:
    digest = store.put("tiny", {**MODEL_FILES, "config.json": '{"auto_map": {"AutoModel": "x.Y"}}'})
    assert refusal(store, root, digest).rule == "MODEL-REMOTE-CODE"
    assert names(root) == []


def test_a_store_that_lacks_a_file_is_refused_by_name(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    (store.folder / "tiny/config.json").unlink()
    found = refusal(store, root, digest)
    assert found.rule == "MODEL-SOURCE"
    assert "config.json" in str(found)


def test_a_store_that_is_not_there_is_named(store: Store, root: Path) -> None:
    store.server.shutdown()
    store.server.server_close()
    found = refusal(store, root, "0" * 64)
    assert found.rule == "MODEL-SOURCE"
    assert store.uri in str(found)


def test_an_address_that_is_no_store_is_refused(store: Store, root: Path) -> None:
    assert refusal(store, root, "0" * 64, uri="file:///etc").rule == "MODEL-SOURCE"


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 2**27))
    found = refusal(store, root, digest)
    assert found.rule == "MODEL-DISK"
    assert "0.12 GiB free" in str(found)
    assert list(root.iterdir()) == []


def test_a_changed_file_is_mended_by_the_next_run(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    config = Path(keep(store, root, digest)["path"]) / "config.json"
    config.write_text(MODEL_FILES["config.json"].replace("2", "3"))
    assert keep(store, root, digest)["changed"] is True
    assert config.read_text() == MODEL_FILES["config.json"]


def test_a_pickle_that_was_added_is_gone_after_the_next_run(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    path = Path(keep(store, root, digest)["path"])
    (path / "pytorch_model.bin").touch()
    assert keep(store, root, digest)["changed"] is True
    assert not (path / "pytorch_model.bin").exists()


def test_damage_that_left_size_and_time_alone_is_found_by_the_full_check(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    shard = Path(keep(store, root, digest)["path"]) / "model-00001-of-00002.safetensors"
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    shard.write_text("oNe" * 1000)
    os.utime(shard, ns=times)
    assert keep(store, root, digest)["changed"] is False
    assert keep(store, root, digest, full_check=True)["changed"] is True
    assert shard.read_text() == MODEL_FILES["model-00001-of-00002.safetensors"]


def test_old_versions_go_beyond_the_number_to_keep_and_one_in_use_stays(
    store: Store, root: Path, tmp_path: Path
) -> None:
    digests = []
    for version in range(4):
        digests.append(store.put("tiny", {**MODEL_FILES, "config.json": f'{{"version": {version}}}'}))
        path = Path(keep(store, root, digests[-1], keep=9)["path"])
        os.utime(path, (version, version))
    reference = tmp_path / "engine.yaml"
    reference.write_text(f"model: {root / 'tiny' / digests[0][:12]}\n")
    done = keep(store, root, digests[3], references=[str(reference)])
    assert done["removed"] == [str(root / "tiny" / digests[1][:12])]
    assert names(root) == sorted(digest[:12] for digest in (digests[0], digests[2], digests[3]))
    assert keep(store, root, digests[3], references=[str(reference)])["changed"] is False


def test_the_version_that_is_wanted_stays_also_when_it_is_the_oldest(store: Store, root: Path) -> None:
    old = store.put("tiny", MODEL_FILES)
    keep(store, root, old)
    os.utime(root / "tiny" / old[:12], (0, 0))
    new = store.put("tiny", {**MODEL_FILES, "config.json": "{}"})
    keep(store, root, new)
    keep(store, root, old)
    assert names(root) == sorted([old[:12], new[:12]])


def test_what_a_killed_run_left_of_another_version_is_removed(store: Store, root: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    (root / "tiny/.0123456789ab.partial").mkdir(parents=True)
    (root / "tiny/.0123456789ab.old").mkdir()
    keep(store, root, digest)
    assert [path.name for path in (root / "tiny").iterdir() if path.is_dir()] == [digest[:12]]
