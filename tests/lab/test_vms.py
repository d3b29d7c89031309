"""QEMU nodes as far as they are words and files; that they boot is proven in tests/vm."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpuyard.cli import app
from gpuyard.lab import agent, host, vms
from gpuyard.lab.errors import LabError
from gpuyard.lab.packages import kernel_module
from gpuyard.lab.place import Place

from .conftest import refused


@pytest.fixture
def image(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A base image that is none, and a qemu-img that writes down what it was asked."""
    made = place.cache / "lab/vm-1"
    made.mkdir(parents=True)
    (made / "disk.img").write_text("")
    (place.cache / "lab/vm").symlink_to("vm-1")
    (tmp_path / "bin").mkdir()
    for name in ("qemu-img", "qemu-system-x86_64"):
        (tmp_path / "bin" / name).write_text(
            '#!/bin/sh\nfor last; do :; done\ncase $last in *G) ;; *) echo "$@" >"$last";; esac\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(vms, "refuse_a_full_disk", lambda _: None)
    return place


@pytest.fixture
def booted(image: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Brings a node up; what would have been run."""

    def up(name: str = "t-vm", **how: str) -> list[str]:
        ran: list[str] = []
        monkeypatch.setattr(vms, "start", lambda *words: ran.extend(map(str, words[-1])))
        monkeypatch.setattr(vms, "end", lambda *_: None)
        monkeypatch.setattr(vms, "end_orphans", lambda _: None)
        monkeypatch.setattr(vms, "_wait_for_login", lambda *_: True)
        vms.up(image, name, how.get("accel", "tcg"))  # type: ignore[arg-type]
        return ran

    return up


def after(words: list[str], option: str) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == option]


def test_a_node_listens_on_the_loopback_alone_and_has_no_way_out(booted: Callable[..., list[str]]) -> None:
    (net,) = after(booted(), "-netdev")
    assert "restrict=on" in net
    assert net.count("hostfwd=") == 1
    assert "hostfwd=tcp:127.0.0.1:" in net


def test_what_a_guest_has_flushed_is_on_the_disk(booted: Callable[..., list[str]]) -> None:
    drives = [drive for drive in after(booted(), "-drive") if "qcow2" in drive]
    assert len(drives) == 3
    assert all("cache=writeback" in drive for drive in drives), "unsafe would lose it, and directsync lose nothing"


@pytest.mark.parametrize(("accel", "begins"), [("tcg", "tcg"), ("kvm", "kvm")])
def test_kvm_is_only_taken_where_it_is_asked_for(booted: Callable[..., list[str]], accel: str, begins: str) -> None:
    (found,) = after(booted(accel=accel), "-accel")
    assert found.startswith(begins)


def test_an_emulated_node_has_the_memory_barriers_that_its_disks_need(booted: Callable[..., list[str]]) -> None:
    (processors,) = after(booted(), "-smp")
    assert int(processors) > 1, "for one alone QEMU before 8.1 emits none"


def test_a_layer_is_made_on_the_very_base_and_not_on_the_link_to_the_current(
    booted: Callable[..., list[str]], image: Place
) -> None:
    booted()
    assert f"-b {image.cache.resolve()}/lab/vm-1/disk.img" in (image.vm("t-vm") / "system.qcow2").read_text()


def test_the_seed_holds_keys_for_root_alone_and_both_versions_of_the_driver(
    booted: Callable[..., list[str]], image: Place
) -> None:
    booted()
    seed = image.vm("t-vm") / "seed.tar"
    assert seed.stat().st_mode & 0o077 == 0
    with tarfile.open(seed) as tar:
        modes = {entry.name: entry.mode for entry in tar}
        assert all(entry.uid == entry.gid == 0 for entry in tar)
    assert modes["etc/ssh/ssh_host_ed25519_key"] == modes["root/.ssh/authorized_keys"] == 0o600
    packages = {Path(name).name for name in modes if name.endswith(".deb")}
    assert packages == {f"nvidia-kernel-open-dkms_{version}-1_amd64.deb" for version in ("580.126.20", "590.48.01")}


def test_a_port_of_an_earlier_boot_is_no_longer_trusted(booted: Callable[..., list[str]], image: Place) -> None:
    booted()
    first = (image.ssh / "known_hosts").read_text()
    booted()
    second = (image.ssh / "known_hosts").read_text()
    assert len(first.splitlines()) == len(second.splitlines()) == 1
    assert first.split()[1:] == second.split()[1:], "the key is the node's, whatever its port"


def test_nodes_in_qemu_keep_a_lab_without_a_network_from_being_taken_for_a_deleted_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Place] = []
    monkeypatch.setattr(host, "empty_all_cgroups", ended.append)
    host.end_orphans(place)
    assert ended == [place]
    place.vms.mkdir(parents=True)
    host.end_orphans(place)
    assert ended == [place]


@pytest.mark.parametrize("name", ["../../t", "T", "a/b", ".x", "", "vm.x"])
def test_a_name_that_would_leave_the_folder_is_refused_by_every_call(image: Place, name: str) -> None:
    beside = image.state / "t"
    beside.mkdir(parents=True)
    for call in (vms.cut, vms.down, vms.login, lambda place, name: vms.up(place, name, "tcg")):
        with refused("LAB-NAME"):
            call(image, name)
    assert beside.is_dir()


def test_an_unknown_node_is_refused_with_those_there_are(booted: Callable[..., list[str]], image: Place) -> None:
    booted("t-one")
    for call in (vms.cut, vms.login):
        with refused("LAB-VM") as caught:
            call(image, "t-two")
        assert "t-one" in str(caught.value)


def test_without_an_image_or_a_program_it_says_what_to_run(image: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (image.cache / "lab/vm").unlink()
    with refused("LAB-IMAGE") as caught:
        vms.up(image, "t-vm", "tcg")
    assert "tools/setup vm" in str(caught.value)
    monkeypatch.setenv("PATH", "/nonexistent")
    with refused("LAB-TOOLS") as caught:
        vms.up(image, "t-vm", "tcg")
    assert "qemu-system-x86" in str(caught.value)


def test_a_removal_that_was_killed_half_way_is_ended_by_the_next(
    booted: Callable[..., list[str]], image: Place
) -> None:
    booted()
    image.vm("t-vm").rename(image.vms / ".t-vm.gone")
    vms.down(image, "t-vm")
    assert list(image.vms.iterdir()) == []


def test_the_driver_is_a_dkms_package_whose_every_part_names_the_same_version() -> None:
    package = kernel_module.dkms("590.48.01")
    assert package.name == "nvidia-kernel-open-dkms"
    assert 'PACKAGE_VERSION="590.48.01"' in package.files["usr/src/nvidia-590.48.01/dkms.conf"]
    assert '-DDRIVER_VERSION=\\"590.48.01\\"' in package.files["usr/src/nvidia-590.48.01/Kbuild"]
    assert "common.postinst nvidia 590.48.01" in package.postinst
    assert "dkms remove -m nvidia -v 590.48.01" in package.prerm


# --- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    (tmp_path / "Pulumi.yaml").write_text("name: gpuyard\n")
    monkeypatch.chdir(tmp_path)
    made: list[tuple[object, ...]] = []
    state = agent.VmState(name="t-vm", port=2222, running=True)

    def note(call: str, answer: object) -> None:
        def called(_: agent.LabRef, *words: object) -> object:
            made.append((call, *words))
            return answer

        monkeypatch.setattr(agent, call, called)

    for call, answer in {"vm_up": state, "vm_cut": None, "vm_down": None, "vms_read": [state]}.items():
        note(call, answer)
    return made


def vm(*words: str, **env: str) -> str:
    done = CliRunner().invoke(app, ["lab", "vm", *words], env=env)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_each_command_is_one_call(calls: list[tuple[object, ...]]) -> None:
    assert "127.0.0.1:2222" in vm("up", "t-vm")
    vm("cut", "t-vm")
    vm("down", "t-vm")
    assert '"running": true' in vm("status", "--json")
    assert "127.0.0.1:2222" in vm("status")
    assert calls[:3] == [("vm_up", "t-vm", "tcg"), ("vm_cut", "t-vm"), ("vm_down", "t-vm")]


def test_the_accelerator_comes_from_the_option_or_the_environment(calls: list[tuple[object, ...]]) -> None:
    vm("up", "t-vm", GPUYARD_VM_ACCEL="kvm")
    vm("up", "t-vm", "--accel", "tcg", GPUYARD_VM_ACCEL="kvm")
    assert calls == [("vm_up", "t-vm", "kvm"), ("vm_up", "t-vm", "tcg")]
    wrong = CliRunner().invoke(app, ["lab", "vm", "up", "t-vm", "--accel", "hvf"])
    assert wrong.exit_code == 2


def test_a_refusal_is_told_in_one_line(calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise LabError("LAB-VM", "no QEMU node x in lab")

    monkeypatch.setattr(agent, "vm_cut", cut)
    done = CliRunner().invoke(app, ["lab", "vm", "cut", "x"])
    assert (done.exit_code, done.stderr) == (3, "LAB-VM: no QEMU node x in lab\n")
