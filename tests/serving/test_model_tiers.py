"""A model comes from the nearest tier that has it, and every byte is compared on each hop."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugins.module_utils import model_ahead, model_room, model_shared, model_source
from plugins.module_utils.model_room import GIB, Held, Room, to_give_up
from plugins.module_utils.model_shared import Lock
from plugins.module_utils.model_verify import ModelError
from plugins.module_utils.model_watched import watched
from plugins.modules import model_dir
from tests.serving.conftest import MODEL_FILES, Store

# The store is a thread of this process; on a node there is none when the module forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SHARD = "model-00001-of-00002.safetensors"
usage = namedtuple("usage", "total used free")


class Node:
    """One node with a disk of its own; all of them see one shared folder."""

    def __init__(self, root: Path, store: Store, shared: Path | str) -> None:
        self.root, self.store, self.shared = root, store, shared
        root.mkdir()

    def keep(self, digest: str, name: str = "tiny", check_mode: bool = False, **more: Any) -> dict[str, Any]:
        """One run of the module."""
        arguments = {
            "name": name,
            "uri": self.store.uri,
            "manifest_sha256": digest,
            "root": str(self.root),
            "keep": 2,
            "references": [],
            "full_check": False,
            "locked": [{"name": name, "manifest_sha256": digest}],
            "budget_gib": 0,
            "shared": str(self.shared),
            "shared_seconds": 5,
            "shared_wait_seconds": 60,
            "read_ahead": False,
            **more,
        }
        return model_dir.store_model(arguments, check_mode)

    def holds(self, digest: str, name: str = "tiny") -> bool:
        path = self.root / name / digest[:12]
        return all((path / file).read_text() == text for file, text in MODEL_FILES.items())

    def names(self) -> list[str]:
        """Every version on the node."""
        return sorted(str(p.relative_to(self.root)) for p in self.root.glob("*/*") if p.is_dir() and p.name[0] != ".")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def one(tmp_path: Path, store: Store, shared: Path) -> Node:
    return Node(tmp_path / "one", store, shared)


@pytest.fixture
def two(tmp_path: Path, store: Store, shared: Path) -> Node:
    return Node(tmp_path / "two", store, shared)


@pytest.fixture
def asked(store: Store) -> Iterator[list[str]]:
    """What the store was asked for, file by file."""
    paths: list[str] = []
    handler = store.server.RequestHandlerClass
    get = handler.func.do_GET  # type: ignore[attr-defined]

    def listed(self: Any) -> None:
        paths.append(self.path.partition("/tiny/")[2])
        get(self)

    handler.func.do_GET = listed  # type: ignore[attr-defined]
    yield paths
    handler.func.do_GET = get  # type: ignore[attr-defined]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock beats and goes stale within a test's patience."""
    monkeypatch.setattr(model_shared, "BEAT", 0.1)
    monkeypatch.setattr(model_shared, "STALE", 1.0)
    monkeypatch.setattr(model_shared, "POLL", 0.05)


def files_of(asked: list[str]) -> list[str]:
    return sorted(path for path in asked if path != "MANIFEST.sha256")


# --- the shared folder ---------------------------------------------------------------------------------------------


def test_the_first_node_fills_the_shared_folder_and_the_second_asks_the_store_for_nothing(
    one: Node, two: Node, store: Store, shared: Path, asked: list[str]
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    first = one.keep(digest)
    assert (first["said"], first["shared"]) == ([], len(MODEL_FILES))
    assert files_of(asked) == sorted(MODEL_FILES), "each file once"
    assert [path.name for path in (shared / "tiny").iterdir()] == [digest[:12]], "no lock, no remains"
    store.server.shutdown()
    store.server.server_close()
    second = two.keep(digest)
    assert (second["said"], second["shared"], second["fetched"]) == ([], len(MODEL_FILES), len(MODEL_FILES))
    assert one.holds(digest)
    assert two.holds(digest)
    assert two.keep(digest)["changed"] is False


def test_two_that_fill_at_once_fetch_once(one: Node, two: Node, store: Store, asked: list[str], soon: None) -> None:
    digest = store.put("tiny", MODEL_FILES)
    done: dict[str, dict[str, Any]] = {}
    # The module is one process on each node: here two threads, each with a child of its own.
    threads = [
        threading.Thread(target=lambda node=node, name=name: done.update({name: node.keep(digest)}))
        for name, node in (("one", one), ("two", two))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert files_of(asked) == sorted(MODEL_FILES)
    assert [done[name]["said"] for name in ("one", "two")] == [[], []]
    assert one.holds(digest)
    assert two.holds(digest)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_the_shared_folder_is_said_and_the_file_comes_from_the_store(
    one: Node, two: Node, store: Store, shared: Path, asked: list[str]
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    one.keep(digest)
    flip(shared / "tiny" / digest[:12] / SHARD)
    asked.clear()
    done = two.keep(digest)
    (said,) = done["said"]
    assert said.startswith("MODEL-HASH: ")
    assert str(shared / "tiny" / digest[:12] / SHARD) in said
    assert asked == [SHARD], "the others came from the folder"
    assert done["shared"] == len(MODEL_FILES) - 1
    assert two.holds(digest)


def test_a_flipped_byte_in_the_store_gets_no_name_in_the_shared_folder_nor_on_the_node(
    one: Node, store: Store, shared: Path
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    flip(store.folder / "tiny" / SHARD)
    with pytest.raises(ModelError) as refused:
        one.keep(digest)
    assert refused.value.rule == "MODEL-HASH"
    assert one.names() == []
    assert [path.name for path in (shared / "tiny").iterdir() if not path.name.endswith(".partial")] == []


def test_a_flipped_byte_on_the_node_is_mended_from_the_shared_folder(one: Node, store: Store, asked: list[str]) -> None:
    digest = store.put("tiny", MODEL_FILES)
    one.keep(digest)
    flip(one.root / "tiny" / digest[:12] / SHARD)
    asked.clear()
    assert one.keep(digest, full_check=True)["shared"] == len(MODEL_FILES)
    assert one.holds(digest)
    assert asked == []


@pytest.mark.parametrize("breaking", ["another manifest", "no manifest", "a file is gone", "a pipe", "a link"])
def test_a_shared_version_that_is_not_whole_is_said_and_the_node_gets_its_model(
    one: Node, two: Node, store: Store, shared: Path, tmp_path: Path, breaking: str
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    one.keep(digest)
    version = shared / "tiny" / digest[:12]
    rule = {"another manifest": "MODEL-HASH", "no manifest": "MODEL-SHARED-ERROR", "a file is gone": "MODEL-MISSING"}
    if breaking == "another manifest":
        (version / "MANIFEST.sha256").write_text("0" * 64 + "  config.json\n")
    elif breaking == "no manifest":
        (version / "MANIFEST.sha256").unlink()
    else:
        (version / SHARD).unlink()
    if breaking == "a pipe":
        os.mkfifo(version / SHARD)
    if breaking == "a link":
        (version / SHARD).symlink_to("/etc/passwd")
    done = two.keep(digest)
    assert [said.partition(":")[0] for said in done["said"]] == [
        rule.get(breaking, "MODEL-SPECIAL" if breaking == "a pipe" else "MODEL-READ")
    ]
    assert two.holds(digest)


def test_a_fill_that_was_killed_is_gone_on_with_by_another_node(
    one: Node, two: Node, store: Store, shared: Path, asked: list[str], soon: None
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    # As kill -9 leaves it: a lock that nobody counts in, one whole file, one cut short under the name of its writer.
    partial = shared / "tiny" / f".{digest[:12]}.partial"
    partial.mkdir(parents=True)
    (partial / SHARD).write_text(MODEL_FILES[SHARD])
    (partial / "config.json.0123456789abcdefpart").write_text("{")
    lock = shared / "tiny" / f".{digest[:12]}.lock"
    lock.write_text("one 0123456789abcdef 000000000007\n")
    done = two.keep(digest)
    assert done["said"] == []
    assert two.holds(digest)
    assert files_of(asked) == sorted(set(MODEL_FILES) - {SHARD}), "what was whole is not fetched again"
    assert [path.name for path in (shared / "tiny").iterdir()] == [digest[:12]]


def test_a_filler_that_is_really_killed_holds_up_the_next_node_for_a_while_only(
    one: Node, two: Node, store: Store, shared: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    with monkeypatch.context() as patch:
        fetch = model_source.Store.fetch

        def killed(self: Any, path: str, wanted: str, target: Path, tell: Any = None) -> None:
            if tell and path == SHARD:
                os.kill(os.getpid(), signal.SIGKILL)  # the process that fills, not the module
            fetch(self, path, wanted, target, tell)

        patch.setattr(model_source.Store, "fetch", killed)
        assert one.keep(digest)["shared"] == 0
    assert one.holds(digest), "the store has it"
    assert (shared / "tiny" / f".{digest[:12]}.lock").is_file()
    done = two.keep(digest)
    assert (done["said"], done["shared"]) == ([], len(MODEL_FILES))
    assert two.holds(digest)


def test_who_waits_for_a_filler_that_lives_goes_to_the_store_at_the_deadline(
    two: Node, store: Store, shared: Path, soon: None
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    (shared / "tiny").mkdir()
    lock = Lock(shared / "tiny" / f".{digest[:12]}.lock")
    assert lock.take()
    began = time.monotonic()
    done = two.keep(digest, shared_wait_seconds=3)
    assert 3 <= time.monotonic() - began < 10
    assert [said.partition(":")[0] for said in done["said"]] == ["MODEL-SHARED-LATE"]
    assert two.holds(digest)
    assert lock.is_mine(), "a lock that beats is nobody else's"
    lock.release()


def test_a_lock_that_was_taken_anew_meanwhile_is_not_broken(shared: Path) -> None:
    mine, other = Lock(shared / "lock"), Lock(shared / "lock")
    assert mine.take()
    assert not other.take()
    mine.over.set()
    other.break_open(b"what somebody dead had written\n")
    assert mine.is_mine()
    assert [path.name for path in shared.iterdir()] == ["lock"]
    other.break_open(mine.text())
    assert list(shared.iterdir()) == []
    mine.release()
    assert other.take()
    mine.release()
    assert other.is_mine(), "who lost it leaves it alone"
    other.release()
    assert list(shared.iterdir()) == []


def test_a_full_shared_folder_is_said_and_passed_over(
    one: Node, store: Store, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    real = model_shared.shutil.disk_usage
    monkeypatch.setattr(
        model_shared.shutil,
        "disk_usage",
        lambda path: usage(GIB, GIB, 2**20) if str(path).startswith(str(shared)) else real(path),
    )
    done = one.keep(digest)
    (said,) = done["said"]
    assert said.startswith("MODEL-SHARED-FULL: ")
    assert "0.00 GiB free" in said
    assert one.holds(digest)


@pytest.mark.parametrize(
    ("wrong", "rule"), [("ENOSPC", "FULL"), ("EDQUOT", "FULL"), ("EROFS", "READ-ONLY"), ("EACCES", "READ-ONLY")]
)
def test_what_the_shared_folder_answers_to_a_write_is_said_and_passed_over(
    one: Node, store: Store, shared: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, rule: str
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    fetch = model_source.Store.fetch

    def answered(self: Any, path: str, wanted: str, target: Path, tell: Any = None) -> None:
        if tell:
            raise OSError(getattr(errno, wrong), os.strerror(getattr(errno, wrong)), str(target))
        fetch(self, path, wanted, target)

    monkeypatch.setattr(model_source.Store, "fetch", answered)
    done = one.keep(digest)
    assert [said.partition(":")[0] for said in done["said"]] == [f"MODEL-SHARED-{rule}"]
    assert one.holds(digest)
    assert not (shared / "tiny" / f".{digest[:12]}.lock").exists(), "nobody waits for one who gave up"


def test_a_shared_folder_that_is_not_there_is_not_made_on_the_nodes_own_disk(
    one: Node, store: Store, tmp_path: Path
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    done = one.keep(digest, shared=str(tmp_path / "mnt/models"))
    (said,) = done["said"]
    assert said.startswith("MODEL-SHARED-ABSENT: ")
    assert not (tmp_path / "mnt").exists()
    assert one.holds(digest)


def test_the_folder_is_made_below_a_mount(
    one: Node, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    mount = tmp_path / "mnt"
    mount.mkdir()
    (tmp_path / "mountinfo").write_text(f"1 2 0:1 / {mount} rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(model_shared, "MOUNTINFO", tmp_path / "mountinfo")
    assert one.keep(digest, shared=str(mount / "models"))["said"] == []
    assert (mount / "models/tiny" / digest[:12]).is_dir()


@pytest.mark.parametrize("moment", ["_look", "_await"])
def test_a_shared_folder_that_hangs_holds_up_nobody_for_long(
    one: Node, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A pipe that nobody writes to stands for a server that is away: whoever opens it waits."""
    digest = store.put("tiny", MODEL_FILES)
    os.mkfifo(tmp_path / "server")
    monkeypatch.setattr(model_shared.Shared, moment, lambda *_: (tmp_path / "server").read_text())
    began = time.monotonic()
    done = one.keep(digest, shared_seconds=1)
    # While the folder is filled, the store may take its own time.
    assert 1 <= time.monotonic() - began < 6
    assert [said.partition(":")[0] for said in done["said"]] == ["MODEL-SHARED-SILENT"]
    assert one.holds(digest)


def test_a_shared_folder_that_falls_silent_in_the_middle_of_a_file_leaves_no_trace_on_the_node(
    one: Node, two: Node, store: Store, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    one.keep(digest)
    asked.clear()
    copy = model_shared._copy

    def stuck(source: Path, wanted: str, target: Path, tell: Any) -> None:
        if source.name == SHARD:
            target.with_name(f"{target.name}.shared").write_text("half")
            time.sleep(60)
        copy(source, wanted, target, tell)

    monkeypatch.setattr(model_shared, "_copy", stuck)
    done = two.keep(digest, shared_seconds=1)
    assert [said.partition(":")[0] for said in done["said"]] == ["MODEL-SHARED-SILENT"]
    assert done["shared"] == len(MODEL_FILES) - 1
    assert asked == [SHARD]
    assert two.holds(digest)
    assert not list(two.root.rglob("*.shared"))


def test_a_lock_that_cannot_be_written_is_left_to_nobody(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock(shared / "lock")

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock, "_write", full)
    with pytest.raises(OSError, match="No space"):
        lock.take()
    assert list(shared.iterdir()) == []


def test_a_process_that_cannot_be_ended_is_left_behind_and_holds_nothing_open(tmp_path: Path) -> None:
    """What waits in the kernel does not die of SIGKILL; here its death is not awaited either."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, os, signal\n"
        f"sys.path.insert(0, {str(Path(model_shared.__file__).parents[2])!r})\n"
        "import tests.conftest, tests.serving.conftest\n"
        "from plugins.module_utils import model_watched\n"
        "real, model_watched.os.kill = os.kill, lambda *_: None\n"
        "try:\n"
        "    list(model_watched.watched(lambda tell: time.sleep(20), 0.3, 0, time.monotonic() + 60))\n"
        "except TimeoutError:\n"
        "    print('late')\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "late\n"
    assert time.monotonic() - began < 15, "the end of its output was waited for"


def test_one_that_talks_for_ever_ends_at_the_deadline() -> None:
    def talk(tell: Any) -> None:
        while True:
            tell()

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        for _ in watched(talk, 5, 0, time.monotonic() + 0.5):
            pass
    assert time.monotonic() - began < 5


def test_a_model_that_asks_for_code_gets_no_name_in_the_shared_folder(one: Node, store: Store, shared: Path) -> None:
    digest = store.put("tiny", {**MODEL_FILES, "config.json": '{"auto_map": {"AutoModel": "x.Y"}}'})
    with pytest.raises(ModelError) as refused:
        one.keep(digest)
    assert refused.value.rule == "MODEL-REMOTE-CODE"
    assert not (shared / "tiny" / digest[:12]).exists()


def test_a_check_run_touches_no_tier(one: Node, store: Store, shared: Path) -> None:
    digest = store.put("tiny", MODEL_FILES)
    assert one.keep(digest, check_mode=True)["changed"] is True
    assert list(shared.iterdir()) == []
    assert list(one.root.iterdir()) == []


# --- room on the node's own disk -----------------------------------------------------------------------------------

ROOT = Path("/models")
PLENTY = Room(10 * GIB, 1000 * GIB)


def held(name: str, gib: float, used: float) -> Held:
    return Held(ROOT / name, int(gib * GIB), used)


def given_up(need: float, there: list[Held], stays: set[str], room: Room = PLENTY) -> list[str]:
    paths = {ROOT / name for name in stays}
    gone = to_give_up("new", int(need * GIB), ROOT, there, paths, room, ROOT / "new/0")
    return [str(path.relative_to(ROOT)) for path in gone]


THREE = [held("a/1", 3, 30), held("b/1", 3, 10), held("c/1", 3, 20)]


def test_the_least_recently_used_goes_first_and_no_more_than_is_needed() -> None:
    assert given_up(1, THREE, set()) == []
    assert given_up(2, THREE, set()) == ["b/1"]
    assert given_up(5, THREE, set()) == ["b/1", "c/1"]
    assert given_up(10, THREE, set()) == ["b/1", "c/1", "a/1"]


def test_what_stays_is_passed_over_however_old_it_is() -> None:
    assert given_up(2, THREE, {"b/1"}) == ["c/1"]


def test_what_cannot_fit_is_refused_with_the_smallest_budget_that_would_do() -> None:
    with pytest.raises(ModelError) as refused:
        given_up(5.5, THREE, {"a/1", "b/1"})
    assert refused.value.rule == "MODEL-ROOM"
    for part in (
        "may hold 10.00 GiB",
        "holds 9.00 GiB",
        "6.00 GiB stay",
        "needs 5.50 GiB",
        "model_store_budget_gib to 12",
    ):
        assert part in str(refused.value)
    assert given_up(5.5, THREE, {"a/1", "b/1"}, Room(12 * GIB, 1000 * GIB)) == ["c/1"]


def test_a_disk_with_less_room_than_the_budget_counts_as_well() -> None:
    assert given_up(1, THREE, set(), Room(100 * GIB, GIB)) == ["b/1"]
    with pytest.raises(ModelError) as refused:
        given_up(50, THREE, set(), Room(100 * GIB, GIB))
    assert refused.value.rule == "MODEL-DISK"


def test_without_a_budget_nothing_is_given_up() -> None:
    with pytest.raises(ModelError) as refused:
        given_up(2, THREE, set(), Room(0, GIB))
    assert refused.value.rule == "MODEL-DISK"


def test_a_damaged_version_of_the_wanted_model_makes_room_for_itself() -> None:
    assert given_up(5, [held("new/0", 5, 0), held("a/1", 5, 1)], set()) == []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GiB of 7,500 bytes: one model takes 6,600."""
    for module in (model_room, model_dir):
        monkeypatch.setattr(module, "GIB", 7_500)


def test_a_node_gives_up_what_the_lock_no_longer_names_in_the_order_of_its_last_use(
    one: Node, store: Store, small: None, tmp_path: Path
) -> None:
    old = {name: store.put(name, MODEL_FILES) for name in ("a", "b", "served")}
    for name, digest in old.items():
        one.keep(digest, name, locked=[])
    for name, when in (("a", 200), ("b", 100), ("served", 50)):
        os.utime(one.root / name / f".{old[name][:12]}.stat", (when, when))
    reference = tmp_path / "engine.yaml"
    reference.write_text(f"model: {one.root}/served/{old['served'][:12]}\n")
    digest = store.put("tiny", MODEL_FILES)
    done = one.keep(digest, budget_gib=2, references=[str(reference)])
    assert done["removed"] == [str(one.root / "b" / old["b"][:12]), str(one.root / "a" / old["a"][:12])]
    assert one.names() == sorted([f"served/{old['served'][:12]}", f"tiny/{digest[:12]}"])
    assert (one.root / "served" / f".{old['served'][:12]}.stat").stat().st_mtime > 50, "its use was written down"
    assert one.keep(digest, budget_gib=2, references=[str(reference)])["changed"] is False


def test_the_way_back_is_never_given_up_and_the_refusal_leaves_the_node_as_it_was(
    one: Node, store: Store, small: None
) -> None:
    before = store.put("tiny", MODEL_FILES)
    one.keep(before)
    after = store.put("tiny", {**MODEL_FILES, "config.json": "{}"})
    listing = sorted(one.root.rglob("*"))
    with pytest.raises(ModelError) as refused:
        one.keep(after, budget_gib=1)
    assert refused.value.rule == "MODEL-ROOM"
    assert "model_store_budget_gib to 2" in str(refused.value)
    assert sorted(one.root.rglob("*")) == listing
    assert one.keep(after, budget_gib=2)["removed"] == []
    assert one.names() == sorted([f"tiny/{before[:12]}", f"tiny/{after[:12]}"])


def test_what_another_locked_model_has_fetched_so_far_stays_and_other_remains_go(
    one: Node, store: Store, small: None
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    for name in (f".{'a' * 12}.partial", f".{'b' * 12}.partial"):
        (one.root / "next" / name).mkdir(parents=True)
        (one.root / "next" / name / SHARD).write_bytes(bytes(6000))
    done = one.keep(
        digest,
        budget_gib=2,
        locked=[{"name": "next", "manifest_sha256": "a" * 64}, {"name": "tiny", "manifest_sha256": digest}],
    )
    assert done["removed"] == [str(one.root / "next" / f".{'b' * 12}.partial")]
    assert one.holds(digest)


# --- the page cache ------------------------------------------------------------------------------------------------


def test_files_are_read_as_far_as_the_memory_goes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (5_000_000, 3_000_000, 1000), strict=True):
        path.write_bytes(bytes(size))
    assert model_ahead.read_ahead(paths, 10_000_000) == (8_001_000, [])
    assert model_ahead.read_ahead(paths, 6_000_000) == (5_001_000, [paths[1]])
    assert model_ahead.read_ahead(paths, 10_000_000, seconds=-1) == (0, paths)


def test_the_memory_that_is_available_is_read_from_the_kernels_own_words() -> None:
    assert model_ahead.available("MemTotal: 9 kB\nMemFree:  1 kB\nMemAvailable:   2048 kB\n") == 2**21
    assert model_ahead.available("") == 0


def test_a_model_larger_than_half_of_the_memory_is_said(
    one: Node, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put("tiny", MODEL_FILES)
    assert one.keep(digest, read_ahead=True)["said"] == []
    (tmp_path / "meminfo").write_text("MemAvailable: 8 kB\n")
    monkeypatch.setattr(model_dir, "MEMINFO", tmp_path / "meminfo")
    done = one.keep(digest, read_ahead=True)
    assert done["changed"] is False
    (said,) = done["said"]
    assert said.startswith("MODEL-AHEAD: 1 of 6 files")
