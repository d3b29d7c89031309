"""Which kernel a machine boots, read from GRUB's files, and what is refused before a kernel is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plugins.module_utils.kernel_change import (
    READ_ONLY_FILE_SYSTEMS,
    SAVED,
    SETTINGS_TEXT,
    boots,
    dkms_modules,
    entries,
    environment,
    fell_back,
    findings,
)
from plugins.modules import kernel_boot
from plugins.modules.kernel_boot import Machine, RefusedError
from plugins.modules.kernel_modules import last_words

OLD, NEW = "6.1.0-50-amd64", "6.1.0-57-amd64"
DISK = "3f1a09a0-0c6b-4c6d-9f5e-2b1d7c5d8a11"
SUBMENU = f"gnulinux-advanced-{DISK}"


def entry(release: str, kind: str = "advanced") -> str:
    return f"{SUBMENU}>gnulinux-{release}-{kind}-{DISK}"


def menu(*releases: str, saved: bool = True, flat: bool = False) -> str:
    """What grub-mkconfig 2.06 writes, without what nobody here reads."""
    indent = "" if flat else "\t"

    def item(title: str, name: str, indent: str) -> str:
        option = f"--class debian --class os $menuentry_id_option '{name}'"
        return f"{indent}menuentry '{title}' {option} {{\n{indent}\tlinux /boot/vmlinuz\n{indent}}}\n"

    default = SAVED if saved else 'set default="0"'
    text = f'if [ "${{next_entry}}" ] ; then\n   set next_entry=\n   save_env next_entry\nelse\n   {default}\nfi\n'
    if not flat:
        text += item("Debian GNU/Linux", f"gnulinux-simple-{DISK}", "")
        text += f"submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option '{SUBMENU}' {{\n"
    for release in releases:
        text += item(f"Debian, with Linux {release}", f"gnulinux-{release}-advanced-{DISK}", indent)
        text += item(f"Debian, with Linux {release} (recovery mode)", f"gnulinux-{release}-recovery-{DISK}", indent)
    text += "" if flat else "}\n"
    return text + item("UEFI Firmware Settings", "uefi-firmware", "")


# --- what GRUB boots ---


def test_the_entry_of_a_kernel_is_its_id_behind_that_of_its_submenu() -> None:
    assert entries(menu(NEW, OLD)) == {NEW: entry(NEW), OLD: entry(OLD)}
    assert entries(menu(NEW, flat=True)) == {NEW: f"gnulinux-{NEW}-advanced-{DISK}"}
    assert entries("") == {}


@pytest.mark.parametrize(
    ("config", "variables", "once", "default"),
    [
        (menu(NEW, OLD), f"saved_entry={entry(OLD)}\nnext_entry={entry(NEW)}\n", NEW, OLD),
        (menu(NEW, OLD), f"saved_entry={entry(OLD)}\nnext_entry=\n", None, OLD),
        (menu(NEW, OLD, saved=False), f"saved_entry={entry(OLD)}\n", None, None),
        (menu(NEW, OLD), f"saved_entry=gnulinux-simple-{DISK}\n", None, None),
        (menu(NEW, OLD), "", None, None),
    ],
)
def test_the_next_boot_and_all_others_are_read_from_the_environment_block(
    config: str, variables: str, once: str | None, default: str | None
) -> None:
    block = ("# GRUB Environment Block\n" + variables).ljust(1024, "#")
    assert boots(config, environment(block)) == {"once": once, "default": default}


@pytest.mark.parametrize("between", ["/", ", "])
def test_what_dkms_has_for_a_kernel_is_read_as_both_of_its_versions_say_it(between: str) -> None:
    rows = [("nvidia", "580.126.20", OLD, "installed"), ("efa", "2.13.0", OLD, "installed")]
    rows += [("efa", "2.13.0", NEW, "built")]
    lines = [f"{name}{between}{version}, {kernel}, x86_64: {state}" for name, version, kernel, state in rows]
    lines[1] += " (WARNING! Diff between built and installed module!)"
    text = "\n".join([*lines, f"zfs{between}2.1.11: added"])
    assert dkms_modules(text, OLD) == {
        ("nvidia", "580.126.20"): "installed",
        ("efa", "2.13.0"): "installed",
        ("zfs", "2.1.11"): "added",
    }
    assert dkms_modules(text, NEW) == {
        ("nvidia", "580.126.20"): "added",
        ("efa", "2.13.0"): "built",
        ("zfs", "2.1.11"): "added",
    }


TRIAL = {"release": NEW, "boot": "b1", "unheard": False}


@pytest.mark.parametrize(
    ("trial", "boot", "running", "fell"),
    [
        (None, "b1", OLD, False),
        (TRIAL, "b1", OLD, False),  # written down, and not rebooted yet
        (TRIAL, "b2", NEW, False),
        (TRIAL, "b3", OLD, True),
        ({**TRIAL, "unheard": True}, "b3", OLD, False),  # it came up, and nobody was there: to be tried again
    ],
)
def test_a_kernel_fell_back_that_was_booted_and_runs_no_more(
    trial: dict[str, Any] | None, boot: str, running: str, fell: bool
) -> None:
    assert fell_back(trial, boot, running) is fell


def test_the_compilers_errors_are_told_before_its_last_lines() -> None:
    said = "CC nv.o\nnv.c:7:2: error: no vm_flags_set here\nmake[1]: *** [nv.o] Error 1\ncleaning\n"
    assert last_words(said) == "nv.c:7:2: error: no vm_flags_set here; make[1]: *** [nv.o] Error 1"
    assert last_words("a\n\nb\n") == "a; b"


# --- what is refused ---

ASKED: dict[str, Any] = {"node": "a-chat-0", "release": NEW, "free_mib": {"/": 1024, "/boot": 256}}
WELL: dict[str, Any] = {
    "container": False,
    "kernel": OLD,
    "lock": None,
    "unfinished": {},
    "read_only": [],
    "free_mib": {"/": 1024, "/boot": 256},
    "secure_boot": False,
    "key": "",
    "key_enrolled": False,
    "programs_missing": [],
    "configured": True,
    "forgets": True,
    "entries": [OLD],
    "layers": [],
    "file_systems": ["ext2"],
    "driver": "580.126.20",
    "driver_by_dkms": True,
}
LOCK = {"path": "/var/lib/dpkg/lock-frontend", "pid": 9, "command": "unattended-upgr", "waited": 300}


@pytest.mark.parametrize(
    "facts", [{}, {"secure_boot": True, "key_enrolled": True}, {"driver": "", "driver_by_dkms": False}]
)
def test_a_node_that_is_well_is_not_refused(facts: dict[str, Any]) -> None:
    assert findings(ASKED, {**WELL, **facts}) == []


@pytest.mark.parametrize(
    ("facts", "rule", "words"),
    [
        ({"unfinished": {"grub-pc": "half-configured"}}, "APT-DPKG-BROKEN", "grub-pc (half-configured)"),
        ({"lock": LOCK}, "APT-LOCKED", "unattended-upgr (pid 9) holds"),
        ({"free_mib": {"/": 1024, "/boot": 255}}, "KERNEL-DISK", "255 MiB are free"),
        ({"read_only": ["/boot"]}, "APT-READ-ONLY", "the file system of /boot is mounted read-only"),
        ({"programs_missing": ["grub-reboot"], "layers": ["lvm"]}, "KERNEL-BOOTLOADER", "grub-reboot is missing"),
        ({"configured": False, "forgets": False, "entries": []}, "KERNEL-BOOTLOADER", "grub.cfg is missing"),
        ({"layers": ["diskfilter", "mdraid1x"]}, "KERNEL-ONCE", "does not write to diskfilter"),
        ({"file_systems": ["btrfs"]}, "KERNEL-ONCE", "does not write to btrfs"),
        ({"forgets": False}, "KERNEL-ONCE", "its menu is another's"),
        ({"entries": [NEW]}, "KERNEL-ENTRY", f"runs kernel {OLD}"),
        ({"driver_by_dkms": False}, "KERNEL-MODULE", "driver 580.126.20 of a-chat-0 was not built by DKMS"),
        ({"secure_boot": True}, "KERNEL-SECURE-BOOT", "none is there"),
    ],
)
def test_each_fact_is_refused_by_its_rule(facts: dict[str, Any], rule: str, words: str) -> None:
    (found,) = findings(ASKED, {**WELL, **facts})
    assert found.startswith(f"{rule}: ")
    assert words in found
    assert "a-chat-0" in found


def test_what_grub_only_reads_is_what_its_own_script_lists() -> None:
    assert "ext2" not in READ_ONLY_FILE_SYSTEMS
    assert {"btrfs", "zfs"} <= set(READ_ONLY_FILE_SYSTEMS)


# --- the rim: GRUB's files, written by programs that do what GRUB's do ---


class Node:
    """A module whose programs are played here, on files below a folder."""

    check_mode = False

    def __init__(self, folder: Path) -> None:
        self.grub = folder / "grub"
        self.grub.mkdir()
        self.block = self.grub / "grubenv"
        self.ran: list[str] = []

    def run_command(self, words: list[str], **_: Any) -> tuple[int, str, str]:
        self.ran.append(words[0])
        variables = environment(self.block.read_text()) if self.block.is_file() else {}
        match words:
            case ["grub-set-default", name]:
                variables["saved_entry"] = name
            case ["grub-reboot", name]:
                variables["next_entry"] = name
            case ["grub-editenv", _, "unset", name]:
                variables.pop(name)
            case ["update-grub"]:
                (self.grub / "grub.cfg").write_text(menu(NEW, OLD))
            case ["systemd-detect-virt", *_]:
                return 1, "", ""
            case ["dpkg-query", *_]:
                return 0, f"linux-image-{OLD}\t6.1.176-1\thold\nlinux-headers-{OLD}\t6.1.176-1\tinstall\n", ""
        self.block.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        return 0, "", ""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node(tmp_path)
    (node.grub / "grub.cfg").write_text(menu(OLD, saved=False))
    monkeypatch.setattr(kernel_boot, "GRUB", node.grub)
    monkeypatch.setattr(kernel_boot, "SETTINGS", str(tmp_path / "default/zz-gpuyard.cfg"))
    monkeypatch.setattr(kernel_boot, "TRIAL", tmp_path / "kernel-trial")
    monkeypatch.setattr(kernel_boot, "UNHEARD", tmp_path / "kernel-trial.unheard")
    monkeypatch.setattr(kernel_boot, "KEPT", tmp_path / "kernels")
    monkeypatch.setattr(kernel_boot, "BOOT", tmp_path / "boot_id")
    (tmp_path / "boot_id").write_text("b1\n")
    return node


def machine(node: Node, running: str = OLD, boot: str = "b1") -> Machine:
    made = Machine(node)  # type: ignore[arg-type]
    made.running, made.boot = running, boot
    return made


def test_a_kernel_is_the_default_before_the_menu_asks_for_a_saved_one(node: Node, tmp_path: Path) -> None:
    assert machine(node).default(OLD) is True
    assert node.ran.index("grub-set-default") < node.ran.index("update-grub")
    assert (tmp_path / "default/zz-gpuyard.cfg").read_text() == SETTINGS_TEXT
    assert machine(node).told()["boots"] == {"once": None, "default": OLD}
    node.ran.clear()
    assert machine(node).default(OLD) is False, "a second run changes nothing"
    assert not {"grub-set-default", "update-grub"} & set(node.ran)


def test_a_trial_is_for_once_and_comes_to_its_end_in_each_way(node: Node) -> None:
    with pytest.raises(RefusedError, match=r"KERNEL-ONCE: .* no other one to fall back to"):
        machine(node).once(NEW)
    machine(node).default(OLD)
    machine(node).once(NEW)
    assert machine(node).told()["boots"] == {"once": NEW, "default": OLD}
    assert machine(node).told()["fell_back"] is False
    assert machine(node, OLD, "b3").told()["fell_back"] is True
    assert machine(node, NEW, "b2").heard(NEW) is True
    assert machine(node, NEW, "b2").heard(NEW) is False
    assert machine(node, NEW, "b2").default(NEW) is True
    assert machine(node, NEW, "b2").told()["boots"] == {"once": None, "default": NEW}
    with pytest.raises(RefusedError, match="KERNEL-ONCE"):
        machine(node, NEW, "b2").once(NEW)


def test_what_fell_back_is_not_heard_and_the_way_home_forgets_it(node: Node) -> None:
    machine(node).default(OLD)
    machine(node).once(NEW)
    assert machine(node, OLD, "b3").heard(NEW) is False
    assert machine(node, OLD, "b3").default(OLD) is True
    assert machine(node, OLD, "b3").told() | {"packages": 0, "held": 0} == {
        "running": OLD,
        "container": False,
        "fell_back": False,
        "boots": {"once": None, "default": OLD},
        "packages": 0,
        "held": 0,
    }


def test_a_kernel_that_the_menu_does_not_have_is_refused(node: Node) -> None:
    with pytest.raises(RefusedError, match=f"KERNEL-ENTRY: GRUB's menu has no entry of kernel {NEW}"):
        machine(node).default(NEW)


def test_what_a_change_of_before_holds_is_nobody_elses(node: Node, tmp_path: Path) -> None:
    assert machine(node).own()["held"] == [f"linux-image-{OLD}"]
    (tmp_path / "kernels" / OLD).mkdir(parents=True)
    assert machine(node).own() == {
        "packages": {f"linux-image-{OLD}": "6.1.176-1", f"linux-headers-{OLD}": "6.1.176-1"},
        "held": [],
    }
