"""The module behind every locked package: what it decides, on a node that is only pretended."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest

from plugins.modules import apt_locked
from plugins.modules.apt_locked import Have, RefusedError

LOCK = {"libnvidia-ml1": "580.126.20-1", "nvidia-driver-cuda": "580.126.20-1"}


class PretendedNode:
    """A package manager with a memory, that writes down what was done to it."""

    def __init__(self, installed: dict[str, Have] | None = None, known: dict[str, list[str]] | None = None) -> None:
        self.packages = dict(installed or {})
        self.repository = known if known is not None else {name: [version] for name, version in LOCK.items()}
        self.after_refresh = self.repository
        self.takes_along: list[str] = []
        self.unfinished: dict[str, str] = {}
        self.mended_by_configure = True
        self.done: list[str] = []

    def installed(self, names: list[str]) -> dict[str, Have]:
        return {
            name: have
            for name, have in self.packages.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
        }

    def known(self, names: list[str]) -> dict[str, list[str]]:
        return {name: self.repository.get(name, []) for name in names}

    def refresh(self, sources_file: str) -> None:
        self.done.append(f"refresh {sources_file}")
        self.repository = self.after_refresh

    def audit(self) -> str:
        return "not whole" if self.unfinished else ""

    def broken(self) -> dict[str, str]:
        return self.unfinished

    def end_interrupted(self) -> None:
        self.done.append("configure")
        if self.mended_by_configure:
            self.unfinished = {}

    def older(self, version: str, than: str) -> bool:
        return version < than

    def simulate(self, words: list[str]) -> str:
        self.done.append("simulate")
        return "".join(f"Remv {name} [1]\n" for name in [*self.takes_along, *self._going(words)])

    def apply(self, words: list[str]) -> None:
        self.done.append(" ".join(words))
        for name in [*self.takes_along, *self._going(words)]:
            del self.packages[name]
        for word in words[1:]:
            if "=" in word:
                name, version = word.split("=")
                # A change of a held package clears its hold.
                same = name in self.packages and self.packages[name].version == version
                self.packages[name] = Have(version, same and self.packages[name].held)
            elif words[0] == "purge" and not word.startswith("--"):
                del self.packages[word]

    def mark(self, mark: str, names: list[str]) -> None:
        for name in names:
            self.packages[name] = Have(self.packages[name].version, mark == "hold")
        if names:
            self.done.append(f"{mark} {' '.join(sorted(names))}")

    @staticmethod
    def _going(words: list[str]) -> list[str]:
        return [word[:-1] for word in words if word.endswith("-") and not word.startswith("--")]


def present(node: PretendedNode, *, check: bool = False, **params: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "packages": LOCK,
        "replaces": [],
        "allow_downgrade": False,
        "sources_file": None,
        "refresh": False,
        "expect_known": True,
    }
    return apt_locked.make_present(node, {**usual, **params}, check)


def absent(node: PretendedNode, *, check: bool = False) -> dict[str, Any]:
    return apt_locked.make_absent(node, {"packages": LOCK, "replaces": []}, check)


def holding(version: str = "580.126.20-1") -> dict[str, Have]:
    return {name: Have(version, True) for name in LOCK}


# --- what dpkg and apt say -----------------------------------------------------------------------------------------


def test_installed_packages_are_read_without_foreign_and_leftover_ones() -> None:
    text = (
        "libnvidia-ml1\tamd64\t580.126.20-1\thold\tinstalled\n"
        "libnvidia-ml1\ti386\t535.1-1\tinstall\tinstalled\n"
        "nvidia-driver-pinning-580\tall\t580-1\tinstall\thalf-configured\n"
        "nvidia-old\tamd64\t1\tdeinstall\tconfig-files\n"
        "nvidia-never\t\t\tunknown\tnot-installed\n"
        "nvidia-killed\tamd64\t580.126.20-1\tinstall\thalf-installed\n"
    )
    assert apt_locked.parse_installed(text, "amd64") == {
        "libnvidia-ml1": Have("580.126.20-1", True),
        "nvidia-driver-pinning-580": Have("580-1", False),
        "nvidia-killed": Have("", False),
    }


def test_packages_that_are_not_whole_are_named_with_their_state() -> None:
    text = (
        "a\tamd64\t1\tinstall\tinstalled\n"
        "b\tamd64\t1\thold\thalf-configured\n"
        "c\tamd64\t1\tdeinstall\tconfig-files\n"
        "d\tamd64\t1\tinstall\ttriggers-pending\n"
        "e\tamd64\t1\tinstall\tunpacked\n"
    )
    assert apt_locked.parse_broken(text) == {"b": "half-configured", "e": "unpacked"}


def test_versions_on_offer_are_read_without_sources_and_repeats() -> None:
    text = (
        " x | 2-1 | http://mirror/ Packages\n"
        " x | 2-1 | /var/lib/dpkg/status\n"
        " x | 1-1 | http://mirror/ Packages\n"
        " x | 3-1 | http://mirror/ Sources\n"
    )
    assert apt_locked.parse_known(text) == {"x": ["2-1", "1-1"]}


def test_removals_are_read_from_a_rehearsal() -> None:
    text = "Inst x [1] (2 repo [amd64])\nRemv nvidia-kernel-dkms [1]\nPurg y [1]\nConf x (2 repo [amd64])\n"
    assert apt_locked.parse_removals(text) == ["nvidia-kernel-dkms", "y"]


@pytest.mark.parametrize(
    "packages",
    [
        {"x; rm -rf": "1"},
        {"--allow-unauthenticated": "1"},
        {"X": "1"},
        {"x": ""},
        {"x": "latest"},
        {"x": "1 y=2"},
        {"x": "580.*"},
        {"x": 580},
    ],
)
def test_what_is_no_package_with_an_exact_version_is_named(packages: dict[str, Any]) -> None:
    assert len(apt_locked.malformed(packages)) == 1


@pytest.mark.parametrize("version", ["580.126.20-1", "580-1", "1:2.3~rc1+dfsg-4", "13.0.2-1"])
def test_the_versions_that_debian_writes_are_taken(version: str) -> None:
    assert apt_locked.malformed({"nvidia-driver-cuda": version, "libstdc++6": version}) == []


# --- installing ----------------------------------------------------------------------------------------------------


def test_all_packages_come_in_one_rehearsed_transaction_and_are_held() -> None:
    node = PretendedNode()
    result = present(node)
    assert node.done == [
        "simulate",
        "install --allow-change-held-packages libnvidia-ml1=580.126.20-1 nvidia-driver-cuda=580.126.20-1",
        "hold libnvidia-ml1 nvidia-driver-cuda",
    ]
    assert result["changed"]
    assert node.packages == holding()


def test_a_second_run_changes_nothing() -> None:
    node = PretendedNode(holding())
    result = present(node)
    assert node.done == []
    assert not result["changed"]
    assert result["diff"]["before"] == result["diff"]["after"]


def test_a_lost_hold_is_set_again_and_nothing_else() -> None:
    node = PretendedNode({**holding(), "libnvidia-ml1": Have("580.126.20-1", False)})
    assert present(node)["held"] == ["libnvidia-ml1"]
    assert node.done == ["hold libnvidia-ml1"]


def test_a_check_run_rehearses_and_changes_nothing() -> None:
    node = PretendedNode()
    result = present(node, check=True)
    assert result["changed"]
    assert node.done == ["simulate"]
    assert "libnvidia-ml1 580.126.20-1 held" in result["diff"]["after"]


def test_a_version_that_nobody_offers_is_refused_with_what_is_offered() -> None:
    node = PretendedNode(known={"libnvidia-ml1": ["590.48.01-1"], "nvidia-driver-cuda": ["580.126.20-1"]})
    with pytest.raises(RefusedError, match=r"APT-VERSION-UNKNOWN.*libnvidia-ml1=580.126.20-1.*have 590.48.01-1"):
        present(node)
    assert node.done == []


def test_a_version_that_the_index_does_not_have_yet_is_looked_for_in_a_fresh_one() -> None:
    node = PretendedNode(known={})
    node.after_refresh = {name: [version] for name, version in LOCK.items()}
    assert present(node, sources_file="/etc/x.sources")["changed"]
    assert node.done[0] == "refresh /etc/x.sources"


def test_before_the_repository_is_there_a_check_run_says_that_it_looked_nothing_up() -> None:
    node = PretendedNode(known={})
    result = present(node, check=True, expect_known=False)
    assert (result["changed"], result["looked_up"]) == (True, False)
    assert node.done == []


def test_a_new_repository_is_read_even_when_nothing_is_to_be_installed() -> None:
    node = PretendedNode(holding())
    assert not present(node, sources_file="/etc/x.sources", refresh=True)["changed"]
    assert node.done == ["refresh /etc/x.sources"]


def test_a_version_that_is_installed_needs_no_repository() -> None:
    node = PretendedNode(holding(), known={})
    assert not present(node)["changed"]


def test_a_step_back_is_refused_without_consent() -> None:
    node = PretendedNode(holding("590.48.01-1"))
    with pytest.raises(RefusedError, match=r"APT-DOWNGRADE: libnvidia-ml1 590.48.01-1 -> 580.126.20-1"):
        present(node)
    assert node.done == []


def test_a_step_back_with_consent_ends_held() -> None:
    node = PretendedNode(holding("590.48.01-1"))
    assert present(node, allow_downgrade=True)["changed"]
    assert "--allow-downgrades" in node.done[1]
    assert node.packages == holding()


def test_a_transaction_that_takes_another_package_along_is_refused() -> None:
    node = PretendedNode({"cuda-drivers": Have("1", False)})
    node.takes_along = ["cuda-drivers"]
    with pytest.raises(RefusedError, match=r"APT-REMOVES.*cuda-drivers"):
        present(node)
    assert node.done == ["simulate"]


def test_what_is_named_as_replaced_goes_in_the_same_transaction() -> None:
    node = PretendedNode({"nvidia-driver-pinning-580": Have("580-1", True)})
    result = present(node, replaces=["nvidia-driver-pinning-*"])
    assert result["removed"] == ["nvidia-driver-pinning-580"]
    assert node.done[1].endswith(" nvidia-driver-pinning-580-")
    assert node.packages == holding()
    assert "nvidia-driver-pinning-580 absent" in result["diff"]["after"]


def test_a_wanted_package_is_not_replaced_by_a_pattern_that_names_it_too() -> None:
    node = PretendedNode(holding())
    assert not present(node, replaces=["nvidia-*"])["changed"]


# --- what an earlier run left --------------------------------------------------------------------------------------


def test_a_transaction_that_was_killed_is_ended_first() -> None:
    node = PretendedNode(holding())
    node.unfinished = {"libnvidia-ml1": "unpacked"}
    result = present(node)
    assert node.done == ["configure"]
    assert result["ended_interrupted"]
    assert result["changed"]


def test_a_check_run_leaves_a_killed_transaction_as_it_is() -> None:
    node = PretendedNode(holding())
    node.unfinished = {"libnvidia-ml1": "unpacked"}
    assert present(node, check=True)["changed"]
    assert node.done == []


def test_a_package_that_stays_broken_is_refused() -> None:
    node = PretendedNode(holding())
    node.unfinished = {"grub-pc": "half-configured"}
    node.mended_by_configure = False
    with pytest.raises(RefusedError, match=r"APT-DPKG-BROKEN: grub-pc \(half-configured\)"):
        present(node)


def test_a_package_that_waits_for_another_of_the_lock_is_mended_by_the_transaction() -> None:
    node = PretendedNode({"nvidia-driver-cuda": Have("580.126.20-1", False)})
    node.unfinished = {"nvidia-driver-cuda": "unpacked"}
    node.mended_by_configure = False
    assert present(node)["installed"] == ["libnvidia-ml1=580.126.20-1"]
    assert node.packages == holding()


def test_a_locked_package_that_stays_broken_with_nothing_to_install_is_refused() -> None:
    node = PretendedNode(holding())
    node.unfinished = {"nvidia-driver-cuda": "half-configured"}
    node.mended_by_configure = False
    with pytest.raises(RefusedError, match=r"APT-DPKG-BROKEN: nvidia-driver-cuda"):
        present(node)


def test_a_broken_version_is_replaced_by_the_locked_one() -> None:
    node = PretendedNode(holding("570.1-1"))
    node.unfinished = {"libnvidia-ml1": "half-configured"}
    node.mended_by_configure = False
    assert present(node)["changed"]
    assert node.packages == holding()


# --- removing ------------------------------------------------------------------------------------------------------


def test_removing_purges_what_is_there_in_whatever_version() -> None:
    node = PretendedNode({"libnvidia-ml1": Have("1-1", True)})
    assert absent(node)["removed"] == ["libnvidia-ml1"]
    assert node.done == ["simulate", "unhold libnvidia-ml1", "purge --allow-change-held-packages libnvidia-ml1"]
    assert node.packages == {}


def test_removing_what_is_not_there_changes_nothing() -> None:
    node = PretendedNode()
    assert not absent(node)["changed"]
    assert node.done == []


def test_removing_refuses_to_take_a_stranger_along() -> None:
    node = PretendedNode({"libnvidia-ml1": Have("1-1", True), "someones-tool": Have("1", False)})
    node.takes_along = ["someones-tool"]
    with pytest.raises(RefusedError, match=r"APT-REMOVES.*someones-tool"):
        absent(node)
