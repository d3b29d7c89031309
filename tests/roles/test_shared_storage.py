"""How shared file systems are mounted, and what is refused. On nodes that are only pretended."""

from __future__ import annotations

import configparser
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.module_utils.shared_storage import (
    KINDS,
    MARK,
    Answer,
    Mount,
    Node,
    judge,
    mounted_at,
    options_of,
    refusals,
    settings_of,
    slower,
    stale_units,
    unit_of,
    units_for,
)
from plugins.modules import shared_storage_proof

PROJECT = Path(__file__).parents[2]
MODELS = Mount("nfs", "files.example.com:/models", "/mnt/models")
EACH = {
    "nfs": MODELS,
    "efs": Mount("efs", "fs-0123.efs.us-east-1.amazonaws.com:/", "/mnt/efs"),
    "lustre": Mount("lustre", "fs-0123.fsx.us-east-1.amazonaws.com@tcp:/abcd", "/mnt/lustre"),
    "bind": Mount("bind", "/data/models", "/mnt/models"),
}
each_kind = pytest.mark.parametrize("mount", EACH.values(), ids=EACH)


def text(mount: Mount, autofs: bool = True) -> str:
    return units_for(mount, autofs, 30)[unit_of(mount.path)]


def parsed(unit: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",), delimiters=("=",), strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit)
    return parser


def test_every_kind_is_tried_here() -> None:
    assert set(EACH) == set(KINDS)


@each_kind
def test_every_option_and_every_setting_has_its_reason_and_its_source(mount: Mount) -> None:
    for option in (*options_of(mount), *settings_of(mount, 30)):
        assert len(option.why) > 5, option
        assert option.source, option
        assert f"# {option.text}: {option.why}" in text(mount) or f"# {option.why}\n{option.text}\n" in text(mount)


@each_kind
@pytest.mark.parametrize("autofs", [True, False])
def test_no_target_of_the_boot_waits_for_it(mount: Mount, autofs: bool) -> None:
    unit = parsed(text(mount, autofs))
    assert unit["Unit"]["DefaultDependencies"] == "no"
    assert "local-fs.target" not in text(mount, autofs)
    assert not any(target in unit["Unit"].get("Before", "") for target in ("remote-fs.target", "multi-user.target"))
    assert unit["Mount"]["TimeoutSec"] == "30"


@pytest.mark.parametrize("kind", ["nfs", "efs", "lustre"])
def test_what_comes_over_the_network_is_mounted_at_the_first_access_and_tried_again_for_ever(kind: str) -> None:
    mount = EACH[kind]
    units = units_for(mount, True, 30)
    assert list(units) == [unit_of(mount.path), unit_of(mount.path, "automount")]
    assert "[Install]" not in text(mount), "the boot starts the automount, not the mount"
    assert parsed(list(units.values())[1])["Install"]["WantedBy"] == "multi-user.target"
    assert "network-online" not in list(units.values())[1]
    assert parsed(text(mount))["Unit"]["StartLimitIntervalSec"] == "0"
    assert parsed(text(mount))["Mount"]["ForceUnmount"] == "yes"


def test_a_folder_of_the_node_needs_no_network_and_no_automount() -> None:
    assert list(units_for(EACH["bind"], True, 30)) == ["mnt-models.mount"]
    assert "network" not in text(EACH["bind"])


def test_a_server_that_is_away_never_makes_an_error_of_a_read() -> None:
    for kind in ("nfs", "efs"):
        options = [option.text for option in options_of(EACH[kind])]
        assert "hard" in options
        assert not {"soft", "bg"} & set(options)


@each_kind
def test_reading_alone_is_asked_for(mount: Mount) -> None:
    assert "ro" in parsed(text(replace(mount, read_only=True)))["Mount"]["Options"].split(",")
    assert "rw" in parsed(text(mount))["Mount"]["Options"].split(",")


@pytest.mark.parametrize("path", ["/mnt/models", "/mnt/a-b/c_d", "/srv/.hidden/x.y", "/mnt/m@x", "/.a"])
def test_a_unit_has_the_name_that_systemd_looks_for(path: str) -> None:
    told = subprocess.run(
        ["systemd-escape", "--path", "--suffix=mount", path], capture_output=True, text=True, check=True
    ).stdout
    assert unit_of(path) == told.strip()


def test_every_option_stands_in_the_readme_of_the_role() -> None:
    readme = (PROJECT / "roles/shared_storage/README.md").read_text()
    told = {option.text for mount in EACH.values() for option in options_of(mount) if option.source != "the fleet"}
    assert [option for option in sorted(told) if f"`{option}`" not in readme] == []


# --- refused -------------------------------------------------------------------------------------------------------

LINE = "36 35 8:17 / {path} rw,relatime shared:1 - {fstype} {source} rw"
THERE = {"folders": ("/data/models",)}
ELSEWHERE = LINE.format(path="/mnt/other", fstype="ext4", source="/dev/sdb1")
REFUSED = {
    "another file system there": (
        [MODELS],
        Node(mountinfo=LINE.format(path="/mnt/models", fstype="ext4", source="/dev/sdb1")),
        "STORAGE-MOUNTED",
        "ext4 of /dev/sdb1",
    ),
    "files there": ([MODELS], Node(below={"/mnt/models": ["thesis", "b", "c", "d"]}), "STORAGE-PATH", "(thesis, b, c)"),
    "a line of fstab": (
        [MODELS],
        Node(fstab="# /x /mnt/models nfs\nfiles:/m  /mnt/models/ nfs defaults 0 0\n"),
        "STORAGE-FSTAB",
        "`files:/m /mnt/models/ nfs defaults 0 0`",
    ),
    "another's unit": ([MODELS], Node(units={"mnt-models.mount": "[Mount]\n"}), "STORAGE-UNIT", "mnt-models.mount"),
    "another's automount": ([MODELS], Node(units={"mnt-models.automount": ""}), "STORAGE-UNIT", "mnt-models.automount"),
    "one in the other": (
        [MODELS, replace(MODELS, path="/mnt/models/large")],
        Node(),
        "STORAGE-NESTED",
        "/mnt/models/large and /mnt/models",
    ),
    "one around the other": ([MODELS, replace(MODELS, path="/mnt")], Node(), "STORAGE-NESTED", "/mnt and /mnt/models"),
    "the same path": ([MODELS, EACH["bind"]], Node(folders=("/data/models",)), "STORAGE-NESTED", "side by side"),
    "a kernel without NFS": ([MODELS], Node(missing=["nfs"]), "STORAGE-CLIENT", "cannot mount nfs"),
    "a kernel without Lustre": ([EACH["lustre"]], Node(missing=["lustre"]), "STORAGE-CLIENT", "cannot mount lustre"),
    "no program for Lustre": ([EACH["lustre"]], Node(missing=["mount.lustre"]), "STORAGE-CLIENT", "no mount.lustre"),
    "no such folder": ([EACH["bind"]], Node(), "STORAGE-SOURCE", "/data/models"),
}


@pytest.mark.parametrize(("mounts", "node", "rule", "said"), REFUSED.values(), ids=REFUSED)
def test_a_mount_that_cannot_work_is_refused_with_its_way_out(
    mounts: list[Mount], node: Node, rule: str, said: str
) -> None:
    found = refusals(mounts, node)
    assert [text.split(": ")[0] for text in found] == [rule]
    assert said in found[0]


OURS = {"mnt-models.mount": f"{MARK}\n[Unit]\n", "mnt-models.automount": f"{MARK}\n"}
FINE = {
    "nothing there": ([MODELS], Node()),
    "an empty folder": ([MODELS], Node(below={"/mnt/models": []})),
    "ours, mounted": (
        [MODELS],
        Node(mountinfo=LINE.format(path="/mnt/models", fstype="nfs4", source="f:/m"), units=OURS),
    ),
    "ours, not used yet": (
        [MODELS],
        Node(mountinfo=LINE.format(path="/mnt/models", fstype="autofs", source="systemd-1"), units=OURS),
    ),
    "others elsewhere": ([MODELS], Node(mountinfo=ELSEWHERE, fstab="/dev/sdb1 /mnt/other ext4", units={"a.mount": ""})),
    "side by side": ([MODELS, replace(MODELS, path="/mnt/models2")], Node()),
    "no program of NFS, which a package brings": ([MODELS], Node(missing=["mount.nfs"])),
    "a folder": ([EACH["bind"]], Node(folders=("/data/models",))),
}


@pytest.mark.parametrize(("mounts", "node"), FINE.values(), ids=FINE)
def test_what_can_work_is_let_through(mounts: list[Mount], node: Node) -> None:
    assert refusals(mounts, node) == []


def test_only_units_of_ours_are_taken_away_and_automounts_first() -> None:
    node = Node(units={**OURS, "data.mount": "[Mount]\n"})
    assert stale_units([], node, 30) == ["mnt-models.automount", "mnt-models.mount"]
    assert stale_units([MODELS], node, 30) == []
    assert stale_units([EACH["bind"]], node, 30) == ["mnt-models.automount"], "a bind mount has none"


# --- judged --------------------------------------------------------------------------------------------------------

NFS_SHOWN = (
    "83 30 0:50 / /mnt/models rw,nosuid,nodev,relatime shared:5 - nfs4 files.example.com:/models "
    "rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,addr=10.0.0.9"
)
WELL = Answer(0.1)


def test_what_is_mounted_is_read_as_the_kernel_tells_it() -> None:
    blank = r"40 30 0:50 / /mnt/a\040b rw,nosuid - nfs4 host:/x\040y rw,hard"
    there = mounted_at("/mnt/a b", "\n".join([NFS_SHOWN, blank]))
    assert there is not None
    assert (there.fstype, there.source, there.options) == ("nfs4", "host:/x y", ("rw", "nosuid", "hard"))
    over = LINE.format(path="/mnt/models", fstype="autofs", source="systemd-1")
    there = mounted_at("/mnt/models", f"{over}\n{NFS_SHOWN}")
    assert there is not None and there.fstype == "nfs4", "the one on top"
    assert mounted_at("/mnt/models", "") is None


def test_a_mount_as_asked_for_is_well() -> None:
    assert judge(MODELS, mounted_at("/mnt/models", NFS_SHOWN), WELL) == []
    lustre = (
        "90 30 0:60 / /mnt/lustre rw,nosuid,nodev,noatime - lustre 10.0.1.7@tcp:/abcd rw,checksum,flock,nouser_xattr"
    )
    assert judge(EACH["lustre"], mounted_at("/mnt/lustre", lustre), WELL) == []
    efs = NFS_SHOWN.replace("/mnt/models", "/mnt/efs").replace("files.example.com:/models", EACH["efs"].source)
    efs = efs.replace("vers=4.2", "vers=4.1").replace("hard,", "hard,noresvport,")
    assert judge(EACH["efs"], mounted_at("/mnt/efs", efs), WELL) == []
    bind = "91 30 8:1 /data/models /mnt/models rw,nosuid,nodev,noatime shared:1 - ext4 /dev/sda1 rw"
    assert judge(EACH["bind"], mounted_at("/mnt/models", bind), WELL) == []


AUTOFS = LINE.format(path="/mnt/models", fstype="autofs", source="systemd-1")
EXT4 = LINE.format(path="/mnt/models", fstype="ext4", source="/dev/sda1")
JUDGED = {
    "never mounted": (MODELS, AUTOFS, Answer(30.0, error="No such device"), "STORAGE-NOT-MOUNTED", "(No such device)"),
    "a bare folder": (MODELS, "", WELL, "STORAGE-NOT-MOUNTED", "mnt-models.mount"),
    "a server that went away": (MODELS, NFS_SHOWN, Answer(None), "STORAGE-NO-ANSWER", "its server"),
    "no right to write": (MODELS, NFS_SHOWN, Answer(0.1, error="Permission denied"), "STORAGE-ERROR", "denied"),
    "another export": (MODELS, NFS_SHOWN.replace(":/models", ":/logs"), WELL, "STORAGE-OTHER", ":/logs"),
    "another type": (MODELS, NFS_SHOWN.replace("nfs4 files", "fuse files"), WELL, "STORAGE-OTHER", "fuse"),
    "another folder": (EACH["bind"], EXT4, replace(WELL, same=False), "STORAGE-OTHER", "/data/models"),
    "soft": (MODELS, NFS_SHOWN.replace("hard", "soft"), WELL, "STORAGE-OPTIONS", "hard"),
    "read-only": (MODELS, NFS_SHOWN.replace("rw", "ro"), WELL, "STORAGE-OPTIONS", "rw"),
    "to be written as well": (replace(MODELS, read_only=True), NFS_SHOWN, WELL, "STORAGE-OPTIONS", "without ro"),
    "bytes that were lost": (MODELS, NFS_SHOWN, replace(WELL, kept=False), "STORAGE-LOST", "not what was read"),
}  # fmt: skip


@pytest.mark.parametrize(("mount", "mountinfo", "answer", "rule", "said"), JUDGED.values(), ids=JUDGED)
def test_a_mount_that_is_not_as_asked_for_is_told_with_its_way_out(
    mount: Mount, mountinfo: str, answer: Answer, rule: str, said: str
) -> None:
    found = judge(mount, mounted_at(mount.path, mountinfo), answer)
    assert [text.split(": ")[0] for text in found] == [rule]
    assert said in found[0]


def test_a_rate_far_below_what_it_was_is_a_fault_and_one_a_little_below_is_none() -> None:
    before = {"write_mb_s": 500.0, "read_mb_s": 1000.0}
    assert slower("/mnt/models", Answer(1, write_mb_s=250, read_mb_s=500), before) == []
    (told,) = slower("/mnt/models", Answer(1, write_mb_s=250, read_mb_s=499), before)
    assert told.startswith("STORAGE-SLOW: /mnt/models has read_mb_s 499, and had 1000.")
    assert slower("/mnt/models", Answer(1, write_mb_s=1, read_mb_s=1), {}) == []
    assert slower("/mnt/models", Answer(1), before) == [], "one for reading alone is not measured"


# --- used ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_removed_and_so_is_what_a_run_left_that_was_ended(tmp_path: Path) -> None:
    left = tmp_path / f".gpuyard-proof-{socket.gethostname()}-1"
    left.touch()
    others = tmp_path / ".gpuyard-proof-another-node-1"
    others.touch()
    kept, write, read = shared_storage_proof.written_and_read(tmp_path, 3)
    assert kept
    assert write > 0 < read
    assert list(tmp_path.iterdir()) == [others]


def test_bytes_that_were_not_kept_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "read", lambda *_: bytes(1024 * 1024))
    assert shared_storage_proof.written_and_read(tmp_path, 1)[0] is False
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_nothing_is_mounted(tmp_path: Path) -> None:
    answer = shared_storage_proof.use(replace(MODELS, path=str(tmp_path)), 1, 1)
    assert (answer.error, answer.write_mb_s, list(tmp_path.iterdir())) == ("", None, [])


def test_an_error_is_told_in_the_kernels_words(tmp_path: Path) -> None:
    answer = shared_storage_proof.within(10, replace(MODELS, path=str(tmp_path / "gone")), 0)
    assert answer.error.startswith("No such file or directory")


def test_one_that_does_not_answer_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage_proof, "use", lambda *_: time.sleep(60))
    began = time.monotonic()
    assert shared_storage_proof.within(0.2, MODELS, 0).seconds is None
    assert time.monotonic() - began < 10
