"""The module behind every locked package: what it decides, on a node that is only pretended."""

from __future__ import annotations

import fnmatch
import hashlib
import subprocess
import time
from pathlib import Path
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
        self.reachable = True
        self.along: dict[str, str] = {}
        self.sent = b"as the index says"

    def hashes(self, packages: dict[str, str]) -> dict[str, set[str]]:
        return {
            name: {hashlib.sha256(f"{name} {version} as the index says".encode()).hexdigest()}
            for name, version in packages.items()
            if version in self.repository.get(name, []) or name in self.along
        }

    def fetch(self, words: list[str], into: Path) -> None:
        assert self.reachable
        self.done.append(f"fetch {' '.join(words)}")
        for word in words:
            name, version = word.split("=")
            (into / f"{name}_{version}_amd64.deb").write_bytes(f"{name} {version} ".encode() + self.sent)

    def installed(self, names: list[str]) -> dict[str, Have]:
        return {
            name: have
            for name, have in self.packages.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
        }

    def known(self, names: list[str]) -> dict[str, list[str]]:
        return {name: self.repository.get(name, []) for name in names}

    def refresh(self, sources_file: str) -> None:
        if not self.reachable:
            raise RefusedError("APT-REPOSITORY: it does not answer")
        self.done.append(f"refresh {sources_file}")
        self.repository = self.after_refresh

    def audit(self) -> str:
        return "not whole" if self.unfinished else ""

    def broken(self) -> dict[str, str]:
        return self.unfinished

    def end_interrupted(self, leave: list[str]) -> None:
        self.done.append(" ".join(["configure", *(f"not {name}" for name in leave)]))
        if self.mended_by_configure:
            self.unfinished = {name: status for name, status in self.unfinished.items() if name in leave}

    def older(self, version: str, than: str) -> bool:
        return version < than

    def simulate(self, words: list[str]) -> str:
        self.done.append("simulate")
        removed = "".join(f"Remv {name} [1]\n" for name in [*self.takes_along, *self._going(words)])
        return removed + "".join(f"Inst {name} ({version} lab [amd64])\n" for name, version in self.along.items())

    def apply(self, words: list[str]) -> None:
        self.done.append(" ".join(words))
        for name in [*self.takes_along, *self._going(words)]:
            del self.packages[name]
        for word in words[1:]:
            if word.startswith("/"):
                assert Path(word).is_file()
                word = "=".join(Path(word).name.split("_")[:2])
            if "=" in word and not word.startswith("--"):
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
        "kept": None,
        "allow_downgrade": False,
        "sources_file": None,
        "refresh": False,
        "expect_known": True,
    }
    return apt_locked.make_present(node, {**usual, **params}, check)


def fetched(node: PretendedNode, kept: Path, *, check: bool = False, **params: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"packages": LOCK, "replaces": [], "sources_file": None, "expect_known": True}
    return apt_locked.make_fetched(node, {**usual, "kept": str(kept), **params}, check)


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


def test_a_broken_version_is_replaced_by_the_locked_one_and_its_scripts_are_not_run_again() -> None:
    node = PretendedNode({**holding("570.1-1"), "nvidia-driver-cuda": Have("580.126.20-1", True)})
    node.unfinished = {"libnvidia-ml1": "half-configured", "nvidia-driver-cuda": "half-configured"}
    assert present(node)["changed"]
    assert node.done[0] == "configure not libnvidia-ml1"
    assert node.packages == holding()


# --- keeping the files ---------------------------------------------------------------------------------------------

FETCH = "fetch libnvidia-ml1=580.126.20-1 nvidia-driver-cuda=580.126.20-1"


def test_hashes_and_arrivals_are_read_as_apt_writes_them() -> None:
    text = (
        "Package: x\nVersion: 1\nSHA256: aa\nDescription: words: and\n more: SHA256: bb\n\n"
        "Package: x\nStatus: install ok installed\nVersion: 1\n\nPackage: y\nSHA256: cc\n"
    )
    assert apt_locked.parse_hashes(text) == {"x": {"aa"}, "y": {"cc"}}
    simulation = "Inst x [1-1] (2-1 NVIDIA, local-deb [amd64]) []\nInst y:i386 (3 Debian [i386])\nConf x (2-1 NVIDIA)\n"
    assert apt_locked.parse_arrivals(simulation) == {"x": "2-1", "y": "3"}


def test_a_set_is_brought_once_with_its_hashes_and_installed_from_there_without_the_repository(tmp_path: Path) -> None:
    node, kept = PretendedNode(), tmp_path / "deep/580"
    assert fetched(node, kept)["fetched"] == [f"{name}={version}" for name, version in sorted(LOCK.items())]
    sums = dict(reversed(line.split("  ")) for line in (kept / "SHA256SUMS").read_text().splitlines())
    assert sums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in kept.glob("*.deb")}
    assert sorted(sums) == [f"{name}_{version}_amd64.deb" for name, version in sorted(LOCK.items())]

    node.reachable, node.repository = False, {}
    again = fetched(node, kept, sources_file="/etc/x.sources")
    assert (again["changed"], again["index_read"]) == (False, False)
    assert "APT-REPOSITORY" in again["warnings"][0]
    assert present(node, kept=str(kept), sources_file="/etc/x.sources", refresh=True)["changed"]
    assert node.packages == holding()
    (installed,) = [done for done in node.done if done.startswith("install")]
    assert f"--no-download --option=Dir::Cache::archives={kept}/ {kept}/libnvidia-ml1_580" in installed


def test_a_set_that_is_not_whole_needs_the_repository(tmp_path: Path) -> None:
    node = PretendedNode()
    fetched(node, tmp_path)
    next(tmp_path.glob("libnvidia*.deb")).write_bytes(b"cut")
    node.reachable = False
    with pytest.raises(RefusedError, match="APT-REPOSITORY"):
        fetched(node, tmp_path, sources_file="/etc/x.sources")
    node.reachable = True
    assert fetched(node, tmp_path)["fetched"] == ["libnvidia-ml1=580.126.20-1"]


def test_a_file_that_nobody_verified_is_brought_again(tmp_path: Path) -> None:
    node = PretendedNode()
    fetched(node, tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    assert len(fetched(node, tmp_path)["fetched"]) == 2


def test_a_file_of_another_making_than_the_index_names_is_brought_again(tmp_path: Path) -> None:
    node = PretendedNode()
    fetched(node, tmp_path)
    before = node.hashes
    node.hashes = lambda packages: {**before(packages), "libnvidia-ml1": {"another"}}
    with pytest.raises(RefusedError, match="APT-HASH: libnvidia-ml1_580"):
        fetched(node, tmp_path)
    assert node.done[-1] == "fetch libnvidia-ml1=580.126.20-1"


def test_what_the_node_runs_it_goes_back_to_whatever_the_index_names_by_now(tmp_path: Path) -> None:
    node = PretendedNode(holding())
    fetched(node, tmp_path)
    node.hashes = lambda packages: {name: {"another"} for name in packages}
    assert not fetched(node, tmp_path)["changed"]
    # Nor does a change that is on its way look for another file.
    node.packages = holding("590.48.01-1")
    assert present(node, kept=str(tmp_path), allow_downgrade=True)["changed"]
    assert node.packages == holding()


def test_a_file_that_is_not_what_the_index_names_is_not_kept(tmp_path: Path) -> None:
    node = PretendedNode()
    node.sent = b"something else"
    with pytest.raises(RefusedError, match="APT-HASH"):
        fetched(node, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_is_gone_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    node = PretendedNode(known={})
    for check in (False, True):
        with pytest.raises(RefusedError, match=r"APT-VERSION-UNKNOWN: .*libnvidia-ml1=580.126.20-1"):
            fetched(node, tmp_path / "set", check=check)
    assert not (tmp_path / "set").exists()


def test_a_check_run_brings_nothing(tmp_path: Path) -> None:
    node = PretendedNode()
    assert fetched(node, tmp_path / "set", check=True)["changed"]
    assert (node.done, (tmp_path / "set").exists()) == ([], False)


def test_what_would_come_along_is_brought_too(tmp_path: Path) -> None:
    node = PretendedNode()
    node.along = {"dkms": "3.0-1"}
    assert "dkms=3.0-1" in fetched(node, tmp_path)["fetched"]
    node.reachable = False
    assert present(node, kept=str(tmp_path))["changed"]


@pytest.mark.parametrize("kept", [True, False])
def test_what_would_come_along_and_is_held_is_refused(tmp_path: Path, kept: bool) -> None:
    node = PretendedNode({"dkms": Have("2.8-1", True)})
    node.along = {"dkms": "3.0-1"}
    with pytest.raises(RefusedError, match=r"APT-HELD: .* dkms.*apt-mark unhold dkms"):
        fetched(node, tmp_path) if kept else present(node)
    assert not any(done.startswith("install") for done in node.done)


def test_installing_without_a_fetch_before_keeps_the_files(tmp_path: Path) -> None:
    node = PretendedNode()
    node.along = {"dkms": "3.0-1"}
    assert present(node, kept=str(tmp_path))["changed"]
    assert [done for done in node.done if done.startswith("fetch")] == [FETCH, "fetch dkms=3.0-1"]
    node.reachable = False
    assert not present(node, kept=str(tmp_path))["changed"]


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


# --- time ------------------------------------------------------------------------------------------------------------


class Ran:
    """What a node's commands are, and an answer for those that change something."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> tuple[int, str, str]:
        self.commands.append(command)
        return (self.code, "Setting up nvidia-persistenced ...", "") if "timeout" in command else (0, "", "")


def test_what_runs_the_scripts_of_packages_is_bounded() -> None:
    node = apt_locked.Node(ran := Ran(0), 90)
    node.apply(["install", "nvidia-persistenced"])
    node.end_interrupted()
    assert [command[:4] for command in ran.commands] == [
        ["timeout", "--kill-after=30", "90", "apt-get"],
        ["timeout", "--kill-after=30", "90", "dpkg"],
        ["dpkg", "--set-selections"],
    ]


@pytest.mark.parametrize(
    ("code", "said"), [(124, "did not end within 90 s"), (137, "did not end within 90 s"), (100, r"failed \(100\)")]
)
def test_a_transaction_that_does_not_end_says_how_long_it_had(code: int, said: str) -> None:
    with pytest.raises(RefusedError, match=rf"APT-FAILED: the transaction {said}.*Setting up nvidia-persistenced"):
        apt_locked.Node(Ran(code), 90).apply(["install", "nvidia-persistenced"])


def test_a_script_that_waits_for_ever_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    (hanging := tmp_path / "apt-get").write_text(f"#!/bin/sh\nsleep 300 &\necho $! >{tmp_path}/child\nwait\n")
    hanging.chmod(0o755)

    def run(command: list[str], **_: Any) -> tuple[int, str, str]:
        if "timeout" not in command:
            return 0, "", ""
        ran = subprocess.run([str(hanging) if word == "apt-get" else word for word in command], check=False)
        return ran.returncode, "", ""

    with pytest.raises(RefusedError, match="did not end within 1 s"):
        apt_locked.Node(run, 1).apply(["install", "x"])
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 10
    # A signal that was sent is not yet one that has come.
    while there(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not there(child)


def test_what_hung_in_a_script_is_left_and_its_journal_keeps_apt_from_nothing(tmp_path: Path) -> None:
    """A real dpkg, of a folder of its own, with a package whose script never ends and one that waits for its turn."""
    for folder in ("info", "updates", "triggers"):
        (tmp_path / "root/var/lib/dpkg" / folder).mkdir(parents=True)
    for file in ("status", "available"):
        (tmp_path / "root/var/lib/dpkg" / file).touch()
    for name, postinst in (("hangs", "sleep 300"), ("waits", "true")):
        (control := tmp_path / name / "DEBIAN").mkdir(parents=True)
        (control / "control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: {name}\n"
        )
        (control / "postinst").write_text(f"#!/bin/sh\n{postinst}\n")
        (control / "postinst").chmod(0o755)
        subprocess.run(["dpkg-deb", "--build", tmp_path / name], check=True, capture_output=True)

    def run(command: list[str], **how: Any) -> tuple[int, str, str]:
        at = command.index("dpkg") if "dpkg" in command else 0
        apart = [f"--root={tmp_path}/root", "--force-script-chrootless", "--force-not-root", "--log=/dev/null"]
        words = [*command[: at + 1], *(apart if command[at] == "dpkg" else apart[:1]), *command[at + 1 :]]
        done = subprocess.run(words, input=how.get("data"), capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    node, journal = apt_locked.Node(run, 2), tmp_path / "root/var/lib/dpkg/updates"
    run(["dpkg", "--unpack", str(tmp_path / "hangs.deb"), str(tmp_path / "waits.deb")])
    run(["timeout", "--kill-after=1", "2", "dpkg", "--configure", "hangs"])
    assert list(journal.iterdir()), "what apt refuses to work beside"
    assert node.broken() == {"hangs": "half-configured", "waits": "unpacked"}
    node.end_interrupted(["hangs"])
    assert list(journal.iterdir()) == []
    assert node.broken() == {"hangs": "half-configured"}


def there(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
