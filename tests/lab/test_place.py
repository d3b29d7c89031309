"""Addresses, locks and state files of a lab, without one."""

import ipaddress
import os
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpuyard.lab import host
from gpuyard.lab.host import Process, boot_id, proc_stat
from gpuyard.lab.models import LabRef, NodeSpec
from gpuyard.lab.place import Place, flock, free_address, free_subnet, read_json, write_atomically, write_json

from .conftest import refused

SUBNET = "10.77.3.0/24"


def test_gateways_and_gpu_nodes_get_addresses_of_their_own_range() -> None:
    assert free_address(SUBNET, {}, "g", "gateway") == "10.77.3.10"
    assert free_address(SUBNET, {}, "n", "gpu") == "10.77.3.20"


def test_a_node_keeps_its_address_and_a_new_one_gets_the_first_that_is_free() -> None:
    taken = {"a": "10.77.3.20", "c": "10.77.3.22"}
    assert free_address(SUBNET, taken, "c", "gpu") == "10.77.3.22"
    assert free_address(SUBNET, taken, "b", "gpu") == "10.77.3.21"


def test_a_lab_without_a_free_address_is_refused() -> None:
    taken = {str(n): f"10.77.3.{n}" for n in range(10, 20)}
    with refused("LAB-FULL"):
        free_address(SUBNET, taken, "one-too-many", "gateway")


def test_a_subnet_that_is_routed_or_taken_is_passed_over() -> None:
    routed = [ipaddress.IPv4Network("10.77.1.128/25")]
    assert free_subnet(["10.77.0.0/24"], routed) == "10.77.2.0/24"


def test_a_machine_with_no_subnet_left_is_told_so() -> None:
    with refused("LAB-SUBNET"):
        free_subnet([], [ipaddress.IPv4Network("10.77.0.0/16")])


@pytest.mark.parametrize("name", ["a b", "a;reboot", "../up", "A", "-a", "a-", "", "a" * 64, "a\n"])
def test_a_node_name_that_a_shell_or_a_path_would_read_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        NodeSpec(name=name, role="gpu")


def test_two_projects_and_two_stacks_are_different_labs(tmp_path: Path) -> None:
    labs = [LabRef(project=tmp_path / p, stack=s) for p in ("a", "b") for s in ("x", "y")]
    assert len({lab.id for lab in labs}) == 4
    assert all(len(lab.id) == 6 for lab in labs)


def test_interface_names_fit_into_what_the_kernel_allows(place: Place) -> None:
    assert len(place.bridge) <= 15
    assert len(f"vb-{place.machine('10.77.255.250')}") <= 15


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "lab.json").write_text('{"id": ')
    with refused("LAB-STATE") as caught:
        read_json(tmp_path / "lab.json")
    assert str(tmp_path / "lab.json") in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"a": 1})
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "state.json", 7)  # type: ignore[arg-type]
    assert read_json(tmp_path / "state.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_lock_whose_file_was_deleted_by_its_holder_still_excludes(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", 0, 0
    counting = threading.Lock()

    def hold_and_delete() -> None:
        nonlocal inside, most
        for _ in range(20):
            with flock(path):
                with counting:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                path.unlink()
                with counting:
                    inside -= 1

    threads = [threading.Thread(target=hold_and_delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1


def test_a_process_is_itself_and_a_later_one_with_its_number_is_not() -> None:
    stat = proc_stat(os.getpid())
    assert stat is not None
    assert Process(os.getpid(), stat[1], boot_id()).alive
    assert not Process(os.getpid(), stat[1] + 1, boot_id()).alive
    assert not Process(os.getpid(), stat[1], "another boot").alive


def test_a_zombie_is_not_alive() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert host.wait_until(lambda: (proc_stat(child) or ("", 0))[0] == "Z", 5)
    stat = proc_stat(child)
    assert stat is not None
    assert not Process(child, stat[1], boot_id()).alive
    os.waitpid(child, 0)
