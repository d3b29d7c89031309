"""Which kernel a machine boots, and what speaks against another one: pure reading and judgement of what modules found.

GRUB takes the entry of `next_entry` once and forgets it before it loads the kernel; else that of `saved_entry`. So a
kernel is tried with the first and kept with the second, and what does not come up falls back by itself. Python 3.9 and
the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.gpuyard.fleet.plugins.module_utils.readiness import (
    locked,
    too_full,
    unfinished,
    unsigned,
    unwritable,
)

SETTINGS = "/etc/default/grub.d/zz-gpuyard.cfg"
# Read behind all others, and after what somebody wrote into /etc/default/grub.
SETTINGS_TEXT = """\
# Written by gpuyard. The kernel that boots is the one that was proven (grub-set-default), not the newest. One that
# panics restarts the machine, and GRUB then takes the proven one.
GRUB_DEFAULT=saved
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX panic=30"
"""
SAVED = 'set default="${saved_entry}"'
# What makes a choice one for once, as grub-mkconfig writes it.
FORGETS = "save_env next_entry"
PROGRAMS = ("grub-editenv", "grub-probe", "grub-reboot", "grub-set-default", "update-grub")
# GRUB's own lists of where it only reads (/etc/grub.d/00_header).
READ_ONLY_LAYERS = ("diskfilter", "lvm")
READ_ONLY_FILE_SYSTEMS = ("btrfs", "cpiofs", "newc", "odc", "romfs", "squash4", "tarfs", "zfs")


def entries(config: str) -> dict[str, str]:
    """The entry of each kernel in a grub.cfg, by release, as grub-reboot takes it: its id behind its submenu's."""
    found: dict[str, str] = {}
    above = ""
    for line in config.splitlines():
        submenu = re.match(r"submenu .*\$menuentry_id_option '([^']+)' \{$", line)
        entry = re.match(r"\s*menuentry .*\$menuentry_id_option '(gnulinux-(.+)-advanced-[^']+)' \{$", line)
        if submenu:
            above = f"{submenu.group(1)}>"
        elif entry:
            found.setdefault(entry.group(2), above + entry.group(1))
        elif line == "}":
            above = ""
    return found


def environment(text: str) -> dict[str, str]:
    """The variables of a grubenv."""
    lines = (line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
    return {words[0]: words[1] for words in lines if len(words) == 2}


def kernel_of(entry: str) -> str | None:
    """The release that an entry boots; None where it names none, as the topmost of a menu does."""
    match = re.search(r"gnulinux-([^>]+)-advanced-[^>]*$", entry)
    return match.group(1) if match else None


def boots(config: str, variables: Mapping[str, str]) -> dict[str, str | None]:
    """The release of the next boot alone, and that of every boot after it; None where GRUB's menu decides."""
    saved = kernel_of(variables.get("saved_entry", "")) if SAVED in config else None
    return {"once": kernel_of(variables.get("next_entry", "")), "default": saved}


def dkms_modules(status: str, kernel: str) -> dict[tuple[str, str], str]:
    """State for a kernel of each module that `dkms status` lists, by name and version; "added" where it has none."""
    found: dict[tuple[str, str], str] = {}
    for line in status.splitlines():
        # nvidia/580.126.20, 6.1.0-50-amd64, x86_64: installed; and before version 3: nvidia, 580.126.20, 6.1.0-50-…
        match = re.match(r"([^,/\s]+)(?:/|, )([^,:]+)(?:, ([^,]+), [^:]+)?: (\w+)", line)
        if match:
            name, version, its, state = match.groups()
            if its == kernel:
                found[name, version] = state
            else:
                found.setdefault((name, version), "added")
    return found


def fell_back(trial: Mapping[str, Any] | None, boot: str, running: str) -> bool:
    """Whether a kernel was tried and did not stay up.

    One that came up, and that nobody reached in time, proves nothing against itself: it may be tried again.
    """
    return trial is not None and trial["boot"] != boot and trial["release"] != running and not trial["unheard"]


def findings(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Each with its rule, what is asked, what is there, and the smallest change that passes. Empty: go on.

    `asked`: node, release, free_mib (folder: MiB). `facts`: what the module `kernel_change` gathers.
    """
    node, release = asked["node"], asked["release"]
    what = f"kernel {release}"
    found = unfinished(what, node, facts) + unwritable(what, node, facts) + locked(node, facts)
    found += too_full("kernel", asked, facts, "node_kernel_free_mib_below")
    if facts["programs_missing"] or not facts["configured"]:
        missing = ", ".join(facts["programs_missing"]) or "/boot/grub/grub.cfg"
        found.append(
            f"KERNEL-BOOTLOADER: {what} is to be tried for one boot on {node}, which is done with GRUB and its menu, "
            f"and {missing} is missing. Boot the node with GRUB (grub2-common), or change its kernel by hand"
        )
    else:
        where = [word for word in facts["layers"] if word in READ_ONLY_LAYERS]
        where += [word for word in facts["file_systems"] if word in READ_ONLY_FILE_SYSTEMS]
        if where or not facts["forgets"]:
            why = f"it does not write to {where[0]}, where /boot/grub lies" if where else "its menu is another's"
            found.append(
                f"KERNEL-ONCE: {what} is to be tried for one boot on {node}, and GRUB would not forget it: {why}. A "
                "kernel that does not come up would be booted again and again. Have /boot on a plain partition, and "
                "the menu written by update-grub"
            )
        if facts["kernel"] not in facts["entries"]:
            found.append(
                f"KERNEL-ENTRY: {node} runs kernel {facts['kernel']}, which GRUB's menu does not have, so there is no "
                "way back to it. Reboot the node into a kernel of the menu, or install its image again"
            )
    if facts["driver"] and not facts["driver_by_dkms"]:
        found.append(
            f"KERNEL-MODULE: driver {facts['driver']} of {node} was not built by DKMS, so nothing builds it for {what}"
            ". Lock a driver whose package brings its source, or change the kernel by hand"
        )
    return found + unsigned("kernel", node, facts)
