"""What a node is told has drifted: every rule, from what it is handed; and what it hands on from what tools say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuyard.health import driver_version
from plugins.module_utils import node_upgrade
from tests import programs

OLD, LOCKED, NEW = "580.105.08", "580.126.20", "590.48.01"
KERNEL = "6.1.0-41-amd64"
NAMES = ("libnvidia-ml1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced")
NOTICE = json.dumps(
    {
        "version": 1,
        "closed_by": "gpuyard-notice.service",
        "closed_at": "2026-12-07T10:57:00Z",
        "rule": "NOTICE-BLOCK",
        "why": "its Capacity Block ends",
    }
)
EXCLUDED = ("nvidia-", "libnvidia-", "cuda-", "linux-")


drift = programs.program("node_drift/files/node_drift.py")


def facts(**change: Any) -> Any:
    """A node that is as it was brought, but for what is changed."""
    well = drift.Facts(
        asked=LOCKED,
        pins=dict.fromkeys(NAMES, f"{LOCKED}-1"),
        packages={name: drift.Package("hold", "installed", f"{LOCKED}-1") for name in NAMES},
        loaded=LOCKED,
        loaded_flavour="open",
        kernel=KERNEL,
        module=LOCKED,
        headers=True,
        fabric_manager="inactive",
        upgrades=False,
        left_out=(),
    )
    return well._replace(**change)


def packages(**change: Any) -> dict[str, Any]:
    """The packages of that node, one of them changed; named with underscores, gone where it is None."""
    found = dict(facts().packages)
    for name, package in change.items():
        found[name.replace("_", "-")] = package
    return {name: package for name, package in found.items() if package is not None}


def held(version: str, status: str = "installed") -> Any:
    return drift.Package("hold", status, f"{version}-1")


def test_a_node_that_is_as_it_was_brought_has_not_drifted() -> None:
    assert drift.judge(facts()) == []
    assert drift.judge(facts(asked=None)) == []
    assert drift.judge(facts(upgrades=True, left_out=EXCLUDED)) == []
    assert drift.judge(facts(packages=packages(nvidia_fabricmanager=held(LOCKED)), fabric_manager="active")) == []


@pytest.mark.parametrize(
    ("change", "rule", "found", "way_out"),
    [
        ({"asked": NEW}, "DRIFT-LOCK", f"brought to driver {LOCKED}, the fleet's lock says {NEW}", "upgrade_driver"),
        (
            {"packages": packages(libnvidia_ml1=drift.Package("install", "installed", f"{LOCKED}-1"))},
            "DRIFT-HOLD",
            "the hold on libnvidia-ml1 was lifted",
            "apt-mark hold libnvidia-ml1",
        ),
        ({"pins": {}}, "DRIFT-HOLD", "pins no driver", "--tags nvidia_driver"),
        (
            {"packages": packages(libnvidia_ml1=None)},
            "DRIFT-INSTALLED",
            "libnvidia-ml1 is not installed",
            "--tags nvidia_driver",
        ),
        (
            {"packages": packages(libnvidia_ml1=held(NEW))},
            "DRIFT-INSTALLED",
            f"libnvidia-ml1 is {NEW}-1 and locked is {LOCKED}-1",
            "nvidia_driver_allow_downgrade=true",
        ),
        (
            {"packages": packages(nvidia_kernel_open_dkms=held(LOCKED, "half-configured"))},
            "DRIFT-INSTALLED",
            "nvidia-kernel-open-dkms is half-configured",
            "dpkg --configure --pending",
        ),
        ({"loaded": None}, "DRIFT-LOADED", f"no driver is loaded, {LOCKED} is locked", "--tags nvidia_driver"),
        ({"loaded": OLD}, "DRIFT-LOADED", f"driver {OLD} is loaded, {LOCKED} is locked", "drain_node.yml"),
        ({"loaded_flavour": "proprietary"}, "DRIFT-LOADED", "proprietary kernel modules are loaded", "drain_node.yml"),
        ({"module": None}, "DRIFT-REBOOT", f"kernel {KERNEL} boots next and has no module", "dkms autoinstall -k"),
        ({"module": OLD}, "DRIFT-REBOOT", f"has the module of driver {OLD}, {LOCKED} is locked", "dkms autoinstall"),
        ({"headers": False}, "DRIFT-HEADERS", "its headers are not installed", f"install linux-headers-{KERNEL}"),
        (
            {"upgrades": True},
            "DRIFT-UNATTENDED",
            f"may change libnvidia-ml1, linux-image-amd64, {', '.join(NAMES[1:])}",
            "--tags node_base",
        ),
        (
            {"upgrades": True, "left_out": ("nvidia-", "libnvidia-")},
            "DRIFT-UNATTENDED",
            "may change linux-image-amd64",
            "--tags node_base",
        ),
        # An expression that is none leaves nothing out, and breaks nothing.
        (
            {"upgrades": True, "left_out": ("*", "ml1", *EXCLUDED[1:])},
            "DRIFT-UNATTENDED",
            f"may change {', '.join(NAMES[1:])}",
            "--tags node_base",
        ),
        (
            {"packages": packages(nvidia_fabricmanager=held(OLD)), "fabric_manager": "active"},
            "DRIFT-FABRIC",
            f"nvidia-fabricmanager is {OLD}, the driver is {LOCKED}",
            "--tags nvidia_driver",
        ),
        (
            {"packages": packages(nvidia_fabricmanager_580=held(LOCKED)), "fabric_manager": "failed"},
            "DRIFT-FABRIC",
            "nvidia-fabricmanager.service is failed",
            "systemctl restart",
        ),
        (
            {"notice": NOTICE},
            "DRIFT-NOTICE",
            "gpuyard-notice.service has closed it at 2026-12-07T10:57:00Z: NOTICE-BLOCK: its Capacity Block ends",
            "undrain_node.yml --limit NODE",
        ),
        ({"notice": "{"}, "DRIFT-NOTICE", "notice.json does not say why", "replace_node.yml"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("DRIFT-") else "",
)
def test_each_drift_is_told_by_its_rule_with_a_way_out(
    change: dict[str, Any], rule: str, found: str, way_out: str
) -> None:
    [finding] = drift.judge(facts(**change))
    assert finding.rule == rule
    assert found in finding.found
    assert way_out in finding.change
    assert finding.why


def test_without_headers_the_way_to_a_module_begins_with_them() -> None:
    rules = {finding.rule: finding for finding in drift.judge(facts(module=None, headers=False))}
    assert set(rules) == {"DRIFT-REBOOT", "DRIFT-HEADERS"}
    assert rules["DRIFT-REBOOT"].change == (f"apt-get install linux-headers-{KERNEL} && dkms autoinstall -k {KERNEL}")


def test_without_pins_the_installed_driver_is_what_has_to_survive() -> None:
    rules = [finding.rule for finding in drift.judge(facts(pins={}, module=None))]
    assert rules == ["DRIFT-HOLD", "DRIFT-REBOOT"]


def test_a_node_without_any_driver_has_no_reboot_to_lose_it_in() -> None:
    bare = facts(pins={}, packages={}, loaded=None, loaded_flavour=None, module=None, headers=False)
    assert [finding.rule for finding in drift.judge(bare)] == ["DRIFT-HOLD"]


@pytest.mark.parametrize(
    ("images", "boots"),
    [
        ([], "6.1.0-40-amd64"),
        (["6.1.0-40-amd64", "6.1.0-41-amd64"], "6.1.0-41-amd64"),
        (["6.1.0-9-amd64", "6.1.0-40-amd64"], "6.1.0-40-amd64"),
        (["6.1.0-40-amd64", "6.12.9-amd64"], "6.12.9-amd64"),
        (["6.1.0-40-amd64", "6.1.0-40-cloud-amd64"], "6.1.0-40-cloud-amd64"),
        (["6.8.0-100-generic", "6.8.0-90-generic"], "6.8.0-100-generic"),
        (["6.8.0-generic", "6.8.0-90-generic"], "6.8.0-90-generic"),
        (["rescue", "6.1.0-40-amd64"], "6.1.0-40-amd64"),
    ],
)
def test_the_newest_kernel_boots_next(images: list[str], boots: str) -> None:
    assert drift.next_kernel(images, "6.1.0-40-amd64") == boots


@pytest.mark.parametrize(
    ("menu", "environment", "boots"),
    [
        ('set default="0"', "saved_entry=a>gnulinux-6.1.0-40-amd64-advanced-ab\n", "6.1.0-42-amd64"),
        ('set default="${saved_entry}"', "saved_entry=a>gnulinux-6.1.0-40-amd64-advanced-ab\n", "6.1.0-40-amd64"),
        ('set default="${saved_entry}"', "saved_entry=0\n", "6.1.0-42-amd64"),
        ('set default="${saved_entry}"', "saved_entry=gnulinux-6.1.0-12-amd64-advanced-ab\n", "6.1.0-42-amd64"),
        ('set default="0"', "next_entry=gnulinux-6.1.0-41-amd64-advanced-ab\n####", "6.1.0-41-amd64"),
        ("", "", "6.1.0-42-amd64"),
    ],
)
def test_the_kernel_that_grub_was_told_to_boot_is_the_next_one(menu: str, environment: str, boots: str) -> None:
    images = [f"6.1.0-{number}-amd64" for number in (40, 42, 41)]
    chosen = drift.chosen_kernel(menu, environment)
    assert drift.next_kernel(images, "6.1.0-40-amd64", chosen) == boots


PINS = f"""\
# Managed by gpuyard.

Package: libnvidia-ml1
Pin: version {LOCKED}-1
Pin-Priority: 1001

Package: nvidia-kernel-open-dkms
Pin: version {LOCKED}-1
Pin-Priority: 1001
"""


def test_pins_are_read_as_an_upgrade_reads_them() -> None:
    assert drift.pins_of(PINS) == node_upgrade.pinned(PINS) != {}
    assert drift.FLAVOURS == node_upgrade.FLAVOURS


@pytest.mark.parametrize(
    "text",
    [
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {LOCKED}  Release Build  (x@y)  Wed\n",
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {OLD}  Thu Oct 9\nGCC version: gcc 12\n",
    ],
)
def test_the_loaded_driver_is_read_as_a_probe_reads_it(text: str) -> None:
    assert drift.loaded_of(text) == (driver_version.loaded_version(text), driver_version.loaded_modules(text))
    assert drift.loaded_of(None) == (None, None)


def test_what_dpkg_has_forgotten_is_not_there() -> None:
    text = (
        f"libnvidia-ml1\thold\tinstalled\t{LOCKED}-1\n"
        f"nvidia-kernel-open-dkms\thold\thalf-configured\t{LOCKED}-1\n"
        f"nvidia-settings\tdeinstall\tconfig-files\t{OLD}-1\n"
        "nvidia-kernel-dkms\tunknown\tnot-installed\t\n"
    )
    assert drift.packages_of(text) == {
        "libnvidia-ml1": held(LOCKED),
        "nvidia-kernel-open-dkms": held(LOCKED, "half-configured"),
    }


@pytest.mark.parametrize(
    ("periodic", "timer", "package", "runs"),
    [
        ("1", "enabled", held("2.9"), True),
        ("0", "enabled", held("2.9"), False),
        ("1", "disabled", held("2.9"), False),
        ("1", "enabled", None, False),
    ],
)
def test_unattended_upgrades_run_where_nothing_keeps_them(periodic: str, timer: str, package: Any, runs: bool) -> None:
    settings = (
        f'APT::Periodic::Unattended-Upgrade "{periodic}";\n'
        'Unattended-Upgrade::Package-Blacklist "";\n'
        'Unattended-Upgrade::Package-Blacklist:: "nvidia-";\n'
        'Unattended-Upgrade::Package-Blacklist:: "linux-";\n'
    )
    assert drift.upgrades_of(settings, timer, package) == (runs, ["nvidia-", "linux-"])


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays a node, with no result yet; `systemctl` is only noted."""
    monkeypatch.setattr(drift, "UNITS", tmp_path / "units")
    monkeypatch.setattr(drift, "RESULT", tmp_path / "lib/drift.json")
    monkeypatch.setattr(drift, "DPKG", tmp_path / "status")
    monkeypatch.setattr(drift, "PINS", tmp_path / "preferences.d/pins")
    monkeypatch.setattr(drift, "BETWEEN_SECONDS", 0)
    reloads = tmp_path / "reloads"
    reloads.touch()
    monkeypatch.setattr(drift.subprocess, "run", lambda *_, **__: reloads.write_text(reloads.read_text() + "r"))
    return tmp_path


def refused(node: Path) -> list[str]:
    return sorted(path.parent.name for path in (node / "units").rglob("*.conf"))


def test_a_restart_is_refused_while_it_would_lose_the_driver_and_no_longer(
    node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for found, units, reloads in [
        (facts(), [], ""),
        (facts(module=None), ["kexec.target.d", "reboot.target.d"], "r"),
        (facts(module=None), ["kexec.target.d", "reboot.target.d"], "r"),
        # What else has drifted is no reason: the node comes back as it went.
        (facts(loaded=OLD, packages=packages(libnvidia_ml1=None)), [], "rr"),
    ]:
        monkeypatch.setattr(drift, "gather", lambda _, found=found: found)
        assert drift.main(["guard"]) == 0, "a drift is no failure of the look"
        assert refused(node) == units
        assert (node / "reloads").read_text() == reloads
        kept = json.loads((node / "lib/drift.json").read_text())
        assert kept["findings"] == [finding._asdict() for finding in drift.judge(found)]
    assert "<4>DRIFT-REBOOT: " in capsys.readouterr().out


def test_a_refusal_says_why_and_how_to_restart_all_the_same(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "gather", lambda _: facts(module=None, kernel="6.1%n"))
    drift.main(["guard"])
    text = (node / "units/reboot.target.d/gpuyard-drift.conf").read_text()
    assert "RefuseManualStart=yes\n" in text
    assert "kernel 6.1%%n boots next and has no module of the driver" in text, "systemd would read %n"
    assert "node_drift.py allow-reboot && systemctl reboot" in text
    assert drift.main(["allow-reboot"]) == 0
    assert refused(node) == []
    assert drift.main(["allow-reboot"]) == 0, "consent to what is not refused is nothing to complain about"


def test_what_changes_during_a_look_is_looked_at_again(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd does not watch while the service runs that it started."""
    looks = [facts(), facts(module=None)]

    def gather(_: object) -> Any:
        if len(looks) == 2:
            drift.DPKG.touch()
        return looks.pop(0)

    monkeypatch.setattr(drift, "gather", gather)
    drift.main(["guard"])
    assert refused(node) != []
    assert looks == []


def test_a_look_by_hand_changes_nothing_and_ends_with_1_where_something_has_drifted(
    node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drift, "gather", lambda asked: facts(asked=asked))
    assert drift.main(["look", "--json", "--locked", LOCKED]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["loaded"], told["locked"], told["next_kernel"], told["findings"]) == (LOCKED, LOCKED, KERNEL, [])
    assert drift.main(["look", "--locked", NEW]) == 1
    assert capsys.readouterr().out.startswith("DRIFT-LOCK: the node was brought to driver ")
    assert not (node / "lib").exists()
    assert refused(node) == []
