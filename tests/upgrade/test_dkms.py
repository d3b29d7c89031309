"""Which modules are built before an exchange, for which kernels, and how DKMS is told of them."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.module_utils.dkms import MARK, RESTORE, current, kernels, named, override, refused, sources
from plugins.modules import driver_modules

CONF = """\
PACKAGE_NAME="nvidia"
PACKAGE_VERSION='580.126.20'   # of the driver
BUILT_MODULE_NAME[0]="nvidia"
"""


def test_a_source_is_called_as_its_dkms_conf_says() -> None:
    assert named(CONF) == ("nvidia", "580.126.20")
    assert named('PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="$(cat version)"\n') is None


def test_a_source_lies_where_dkms_looks_for_it() -> None:
    listing = "./usr/src/nvidia-580/dkms.conf\n./usr/src/nvidia-580/old/dkms.conf\n./usr/share/doc/dkms.conf\n"
    assert sources(listing) == ["./usr/src/nvidia-580/dkms.conf"]
    assert sources("./lib/modules/6.1.0-30-amd64/kernel/nvidia-580/nvidia.ko\n") == [], "ready to be loaded"


@pytest.mark.parametrize(
    ("bootable", "headers", "wanted"),
    [
        (["6.1.0-30-amd64"], ["6.1.0-30-amd64"], ["6.1.0-30-amd64"]),
        (
            ["6.1.0-30-amd64", "6.1.0-101-amd64"],
            ["6.1.0-30-amd64", "6.1.0-101-amd64"],
            ["6.1.0-30-amd64", "6.1.0-101-amd64"],
        ),
        (["6.1.0-30-amd64", "6.1.0-9-amd64"], ["6.1.0-30-amd64", "6.1.0-9-amd64"], ["6.1.0-30-amd64"]),
        (["6.1.0-30-amd64", "6.1.0-101-amd64"], ["6.1.0-30-amd64"], ["6.1.0-30-amd64"]),
        ([], ["6.1.0-30-amd64"], ["6.1.0-30-amd64"]),
        ([], [], []),
    ],
)
def test_modules_are_built_for_the_running_kernel_and_the_newest_that_would_be_booted(
    bootable: list[str], headers: list[str], wanted: list[str]
) -> None:
    assert kernels("6.1.0-30-amd64", bootable, headers) == wanted


def test_what_was_built_from_anything_else_is_built_anew() -> None:
    now = {"package": "aa", "headers": {"compile.h": "bb"}, "keys": {}}
    assert current(now, dict(now))
    assert not current(None, now)
    assert not any(current({**now, name: "other"}, now) for name in now)


def test_a_refusal_names_what_is_asked_what_is_there_and_the_way_out() -> None:
    text = refused("a-chat-0", "595.45.04", "6.19.0-1", "error: implicit declaration of function 'ioremap_x'")
    assert text.startswith(
        "DRIVER-BUILD: the modules of driver 595.45.04 are to be built for kernel 6.19.0-1 on a-chat-0"
    )
    assert "implicit declaration" in text
    assert "Lock a driver that builds for this kernel" in text


# --- the hook ---


class Node:
    """A tree of DKMS as it is when `add` has run, and what is kept for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "usr/src/nvidia-580"
        self.source.mkdir(parents=True)
        self.added = root / "var/lib/dkms/nvidia/580"
        self.added.mkdir(parents=True)
        self.built = root / "kept/tree/nvidia/580/6.1.0-30-amd64/x86_64"
        self.module = self.built / "module/nvidia.ko"
        self.module.parent.mkdir(parents=True)
        self.module.write_text("a module")
        self.sum()
        self.script = root / "kept/restore"
        self.script.write_text(
            RESTORE.replace("/var/lib/dkms", f"{root}/var/lib/dkms").replace("/etc/", f"{root}/etc/")
        )
        self.script.chmod(0o755)

    def sum(self) -> None:
        digest = hashlib.sha256(self.module.read_bytes()).hexdigest()
        (self.built / "SHA256SUMS").write_text(f"{digest}  module/nvidia.ko\n")

    def add(self, hook: str = "") -> None:
        """What DKMS does with the hook: it sources the override, and runs what POST_ADD says in the source's folder."""
        text = override(str(self.root / "kept/tree"), str(self.script), "nvidia", "580")
        # This root is deeper than a node's.
        text = text.replace("../../..", "../" * (len(self.source.parts) - 1))
        lines = f'POST_ADD="{hook}"\n{text}\ncd "$1"\nrun="$1/$POST_ADD"\n[[ -x ${{run%% *}} ]] && exec $run'
        subprocess.run(["bash", "-ec", lines, "-", self.source], check=True, timeout=60)

    @property
    def there(self) -> list[str]:
        return sorted(str(path.relative_to(self.added)) for path in self.added.rglob("*") if path.is_file())


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_what_was_built_is_there_once_the_source_is_added(node: Node) -> None:
    node.add()
    assert node.there == ["6.1.0-30-amd64/x86_64/module/nvidia.ko"]
    node.add()
    assert node.there == ["6.1.0-30-amd64/x86_64/module/nvidia.ko"]


def test_what_is_not_as_it_was_built_is_left_to_dkms(node: Node) -> None:
    node.module.write_text("half a mod")
    node.add()
    assert node.there == []


def test_a_hook_of_the_package_runs_too(node: Node) -> None:
    (node.source / "own").write_text('#!/bin/sh\necho "$1" >said\n')
    (node.source / "own").chmod(0o755)
    node.add("own word")
    assert (node.source / "said").read_text() == "word\n"
    assert len(node.there) == 1


def test_a_tree_that_is_elsewhere_is_found(node: Node) -> None:
    settings = node.root / "etc/dkms/framework.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'dkms_tree="{node.root}/elsewhere"\n')
    (node.root / "elsewhere/nvidia/580").mkdir(parents=True)
    node.add()
    assert node.there == []
    assert (node.root / "elsewhere/nvidia/580/6.1.0-30-amd64/x86_64/module/nvidia.ko").is_file()


# --- what is kept no more ---


@pytest.mark.parametrize("check", [False, True])
def test_hooks_of_drivers_that_are_kept_no_more_go_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    sets, hooks = tmp_path / "packages", tmp_path / "dkms"
    hooks.mkdir()
    for version in ("580", "590"):
        (sets / version / "modules").mkdir(parents=True)
        text = override(f"{sets}/{version}/modules/tree", f"{sets}/{version}/modules/restore", "nvidia", version)
        (hooks / f"nvidia-{version}.conf").write_text(text)
    (hooks / "nvidia.conf").write_text("# ours: gpuyard may keep nothing here\n")
    (sets / "580/modules/.half-x").mkdir()
    monkeypatch.setattr(driver_modules, "OVERRIDES", str(hooks))
    module: Any = SimpleNamespace(params={"sets": str(sets), "keep": ["580"]}, check_mode=check)
    assert MARK in (hooks / "nvidia-590.conf").read_text()
    assert driver_modules.forget(module)["changed"]
    there = sorted(path.name for path in hooks.iterdir())
    assert there == ["nvidia-580.conf", *(["nvidia-590.conf"] if check else []), "nvidia.conf"]
    assert (sets / "580/modules/.half-x").exists() == check
    assert driver_modules.forget(module)["changed"] == check
