from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpuyard.handover import Handover, HandoverError, read_handover

Handed = Callable[..., Handover]


def test_a_handover_survives_the_way_through_json(handed: Handed) -> None:
    handover = handed()
    assert read_handover(handover.model_dump(mode="json")) == handover


@pytest.mark.parametrize("version", [2, 0, "1", None, True])
def test_another_version_is_refused(handed: Handed, version: object) -> None:
    with pytest.raises(HandoverError) as refused:
        handed(lambda data: data.update(version=version))
    assert refused.value.rule == "HANDOVER-VERSION"


@pytest.mark.parametrize("data", [None, [], "handover", 1])
def test_what_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(HandoverError, match="HANDOVER-INVALID"):
        read_handover(data)


@pytest.mark.parametrize(
    "name", ["a; reboot", "$(id)", "a`id`", "a b", "a\nb", "a\n", "-a", "A", "a_b", "{{x}}", "../a", "", "a" * 64]
)
def test_a_node_name_that_a_shell_could_read_is_refused(handed: Handed, name: str) -> None:
    with pytest.raises(HandoverError) as refused:
        handed(lambda data: data["nodes"][1].update(name=name))
    assert refused.value.rule == "HANDOVER-INVALID"
    assert "\n" not in str(refused.value)


def _two_alike(data: dict[str, Any]) -> None:
    data["nodes"][1]["name"] = data["nodes"][2]["name"]


def _two_at_one_address(data: dict[str, Any]) -> None:
    data["nodes"][1]["address"] = data["nodes"][2]["address"]


@pytest.mark.parametrize(
    "edit",
    [
        _two_alike,
        _two_at_one_address,
        lambda data: data.update(surprise=1),
        lambda data: data.pop("endpoint"),
        lambda data: data["nodes"][0].update(gpu_count=1),
        lambda data: data["nodes"][1].update(pool=None),
        lambda data: data["nodes"][1].update(gpu_count=0),
        lambda data: data["nodes"][1].update(address="10.0.0.1 -oProxyCommand=id"),
        lambda data: data["nodes"][1].update(port="22"),
        lambda data: data["ssh"].update(user="root -oProxyCommand=id"),
        lambda data: data["ssh"].update(known_hosts_file='/p/"x'),
        lambda data: data["ssh"].update(private_key_file="relative"),
        lambda data: data["mirrors"]["nvidia"].update(uri="file:///etc"),
        lambda data: data["mirrors"]["nvidia"].update(fingerprint="abc"),
        lambda data: data.update(endpoint="http://x/{{ lookup('pipe','id') }}"),
    ],
)
def test_a_handover_of_another_shape_is_refused_in_one_line(handed: Handed, edit: Callable[[Any], object]) -> None:
    with pytest.raises(HandoverError, match="HANDOVER-INVALID") as refused:
        handed(edit)
    assert "\n" not in str(refused.value)
