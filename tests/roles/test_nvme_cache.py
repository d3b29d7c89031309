"""Which disks are taken for a cache, and what is done with what they hold. On disks that are only pretended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plugins.module_utils.nvme_cache import Disk, NvmeError, decide, wanted

INSTANCE_STORE = "Amazon EC2 NVMe Instance Storage"


def listed(name: str, model: str = INSTANCE_STORE, **more: Any) -> dict[str, Any]:
    return {"name": name, "path": f"/dev/{name}", "type": "disk", "size": 10**12, "model": model, "ro": False, **more}


ROOT_PARTITION = {"name": "nvme0n1p1", "type": "part", "mountpoints": [None, "/"]}


def test_disks_are_told_by_their_model_whatever_their_name() -> None:
    disks = [
        listed("nvme0n1", "Amazon Elastic Block Store"),
        listed("nvme3n1", f"{INSTANCE_STORE}  "),
        listed("nvme1n1"),
        listed("vda", None),  # type: ignore[arg-type]
    ]
    assert [disk["name"] for disk in wanted(disks, [INSTANCE_STORE])] == ["nvme3n1", "nvme1n1"]


@pytest.mark.parametrize(
    "carrying",
    [
        {"children": [ROOT_PARTITION]},
        {
            "children": [
                {"name": "p2", "type": "part", "children": [{"name": "vg", "type": "lvm", "mountpoints": ["/var"]}]}
            ]
        },
        {"children": [{"name": "p3", "type": "part", "mountpoints": ["[SWAP]"]}]},
        {"mountpoints": ["/"]},
    ],
)
def test_the_disk_that_carries_the_system_is_never_taken(carrying: dict[str, Any]) -> None:
    assert wanted([listed("nvme0n1", **carrying)], ["*"]) == []


def test_what_cannot_be_written_or_is_no_disk_is_not_taken() -> None:
    odd = [listed("nvme1n1", ro=True), listed("nvme1n1p1", type="part"), listed("nvme9n1", size=0)]
    assert wanted(odd, ["*"]) == []


A = Disk(path="/dev/nvme1n1", serial="AWS1", model=INSTANCE_STORE, size=10**12)
B = replace(A, path="/dev/nvme2n1", serial="AWS2")
MEMBER = {"array": "u-1", "members": 2, "holds": ("linux_raid_member",)}


def ours(disk: Disk, **more: Any) -> Disk:
    return replace(disk, **{**MEMBER, **more})


def test_blank_disks_are_made_one_array_in_the_order_of_their_serial_numbers() -> None:
    plan = decide([B, A], 0, [])
    assert (plan.action, [disk.serial for disk in plan.disks], plan.wipe) == ("make", ["AWS1", "AWS2"], ())


def test_a_whole_array_is_kept_mounted_or_not() -> None:
    for mounted in ((), ("/var/lib/models",)):
        plan = decide([ours(A, mounted=mounted), ours(B, mounted=mounted)], 2, [])
        assert (plan.action, plan.wipe) == ("keep", ())


def test_a_disk_that_came_later_does_not_end_the_array() -> None:
    plan = decide([ours(A), ours(B), replace(A, serial="AWS3")], 0, [])
    assert (plan.action, len(plan.disks)) == ("keep", 2)
    assert "1 more" in plan.why


def test_an_array_that_lost_a_disk_to_a_blank_one_is_made_anew() -> None:
    plan = decide([ours(A), B], 2, [])
    assert plan.action == "make"
    assert [disk.serial for disk in plan.wipe] == ["AWS1"]


def test_parts_of_two_arrays_are_no_array() -> None:
    with pytest.raises(NvmeError, match="NVME-ARRAY-PART"):
        decide([ours(A), ours(B, array="u-2")], 0, [])


def test_no_disk_is_nothing_to_do() -> None:
    assert decide([], 0, []).action == "none"


REFUSED = {
    "a file system": ([A, replace(B, holds=("ext4",))], 0, [], "NVME-DISK-USED", "AWS2) holds ext4"),
    "partitions": ([replace(A, holds=("gpt", "2 partitions")), B], 0, [], "NVME-DISK-USED", "2 partitions"),
    "another's array": ([replace(A, holds=("linux_raid_member",))], 0, [], "NVME-DISK-USED", "linux_raid_member"),
    "raw data": ([replace(A, holds=("data without a known signature",))], 0, [], "NVME-DISK-USED", "[AWS1]"),
    "consent for another disk": ([replace(A, holds=("xfs",)), B], 0, ["AWS2"], "NVME-DISK-USED", "[AWS1]"),
    "in use, with consent": (
        [replace(A, holds=("xfs",), mounted=("/data",))],
        0,
        ["AWS1"],
        "NVME-DISK-MOUNTED",
        "/data",
    ),
    "a missing disk": ([ours(A)], 0, [], "NVME-ARRAY-PART", "array of 2"),
    "one emptied and others missing": ([ours(A, members=8), B], 0, [], "NVME-ARRAY-PART", "array of 8"),
    "fewer than asked for": ([A], 2, [], "NVME-DISK-COUNT", "set nvme_cache_disks to 1"),
    "none of those asked for": ([], 2, [], "NVME-DISK-COUNT", "0 local NVMe disks"),
    "consent for nothing": ([A], 0, ["AWS9"], "NVME-CONSENT", "AWS9"),
    "a broken array in use": ([ours(A, mounted=("/var/lib/models",)), B], 0, [], "NVME-DISK-MOUNTED", "still mounted"),
}


@pytest.mark.parametrize(("disks", "expected", "consent", "rule", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_lose_something_is_refused_with_its_way_out(
    disks: list[Disk], expected: int, consent: list[str], rule: str, said: str
) -> None:
    with pytest.raises(NvmeError) as refused:
        decide(disks, expected, consent)
    assert refused.value.rule == rule
    assert said in str(refused.value)


def test_consent_is_for_the_disk_that_it_names_and_lets_it_go() -> None:
    plan = decide([replace(A, holds=("ext4",)), B], 0, ["AWS1"])
    assert (plan.action, [disk.serial for disk in plan.wipe]) == ("make", ["AWS1"])
    plan = decide([replace(A, holds=("ext4",)), ours(B)], 0, ["AWS1"])
    assert (plan.action, [disk.serial for disk in plan.wipe]) == ("make", ["AWS2", "AWS1"])
    plan = decide([ours(A)], 0, ["AWS1"])
    assert (plan.action, [disk.serial for disk in plan.wipe]) == ("make", ["AWS1"])
