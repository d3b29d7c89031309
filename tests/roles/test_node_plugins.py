"""The small plugins of the node roles: whose key it is, what is on the bus, how a node is."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

from plugins.filter.health import FilterModule as HealthFilters
from plugins.filter.openpgp import openpgp_fingerprint
from plugins.modules.pci_devices_info import find

# Two keys made for this test with gpg; nobody holds their secret halves.
KEY = """-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEawOXJRYJKwYBBAHaRw8BAQdA2OVuWXCoBxzFAfxMiZhQY8gbvSxDqZtzsFQe
IbrtzKK0FW9uZSA8b25lQGV4YW1wbGUub3JnPoiPBBMWCAA4FiEExb5RF9e/MpOb
D7s24lhVtzpxpWIFAmsDlyUCGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQ
4lhVtzpxpWI9XAD4iQuhdexyE7gQr9xYhlKl00lmlR+jB3U3gnnzIS1BmQEAtdWp
pQiWdopvsuv/w9r1wPTFlStc2il+EsCq6mJ4JQo=
=OPUp
-----END PGP PUBLIC KEY BLOCK-----
"""
FINGERPRINT = "C5BE5117D7BF32939B0FBB36E25855B73A71A562"
OTHER_BODY = """mDMEawOXJRYJKwYBBAHaRw8BAQdA0FCYYGavfUDiqO/DSMxjFXWzXPV/qBvNiNAe
rQ0aJV+0FXR3byA8dHdvQGV4YW1wbGUub3JnPoiQBBMWCAA4FiEE0XXpSB6qpxAn
sHlr4a8dUpeBaoAFAmsDlyUCGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQ
4a8dUpeBaoBdKgEApiQzbYcct3upI8tnbOmGTTkOKqvqlntyFCE/jApo9psBALP1
emFDJpIMBer4I/0GjJcRXxVwZdilru23nNd/g68K
=xcdg"""

node_verdicts = HealthFilters().filters()["node_verdicts"]
not_healthy = HealthFilters().filters()["not_healthy"]


# --- the key of the repository -------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_one_gpg_shows() -> None:
    assert openpgp_fingerprint(KEY) == FINGERPRINT


def test_line_endings_and_blanks_around_the_block_do_not_matter() -> None:
    assert openpgp_fingerprint("\n" + KEY.replace("\n", "\r\n") + "\n \n") == FINGERPRINT


def test_another_key_has_another_fingerprint() -> None:
    assert openpgp_fingerprint(KEY.replace(body(), OTHER_BODY)) != FINGERPRINT


@pytest.mark.parametrize(
    "armored",
    [
        "",
        "no key",
        KEY.replace("PUBLIC KEY BLOCK", "PRIVATE KEY BLOCK"),
        KEY + KEY,
        KEY + "a line behind it\n",
        "a line before it\n" + KEY,
        KEY.replace("-----END PGP PUBLIC KEY BLOCK-----", ""),
    ],
)
def test_what_is_not_one_block_and_nothing_else_is_refused(armored: str) -> None:
    with pytest.raises(AnsibleFilterError, match="not one armored OpenPGP public key block"):
        openpgp_fingerprint(armored)


def test_two_keys_in_one_block_are_refused_since_only_one_would_be_compared() -> None:
    both = base64.b64decode(body().split("\n=")[0]) + base64.b64decode(OTHER_BODY.split("\n=")[0])
    armored = KEY.replace(body(), base64.b64encode(both).decode())
    with pytest.raises(AnsibleFilterError, match="holds 2 primary keys"):
        openpgp_fingerprint(armored)


def test_a_key_that_is_cut_short_is_refused() -> None:
    whole = base64.b64decode(body().split("\n=")[0])
    with pytest.raises(AnsibleFilterError, match="damaged"):
        openpgp_fingerprint(KEY.replace(body(), base64.b64encode(whole[:-9]).decode()))


def body() -> str:
    return KEY.split("\n\n", 1)[1].rsplit("\n-----END", 1)[0]


# --- the bus -------------------------------------------------------------------------------------------------------


def test_an_nvswitch_is_told_from_a_gpu_and_from_others_by_vendor_and_class(tmp_path: Path) -> None:
    for address, vendor, kind in (
        ("0000:05:00.0", "0x10de", "0x068000"),
        ("0000:19:00.0", "0x10de", "0x030200"),
        ("0000:00:1f.0", "0x8086", "0x068000"),
    ):
        (tmp_path / address).mkdir()
        (tmp_path / address / "vendor").write_text(f"{vendor}\n")
        (tmp_path / address / "class").write_text(f"{kind}\n")
    assert find(tmp_path, "0x10de", "0x0680") == ["0000:05:00.0"]
    assert find(tmp_path / "nowhere", "0x10de", "0x0680") == []


# --- how a node is -------------------------------------------------------------------------------------------------


def recorded(*states: str) -> dict[str, Any]:
    return {"node_health_recorded": [{"role": "r", "state": s, "reason": f"it is {s}", "checks": []} for s in states]}


def test_a_node_whose_roles_all_proved_their_work_is_healthy() -> None:
    verdicts = node_verdicts(["a"], {"a": recorded("Healthy", "Healthy")})
    assert [(v["node"], v["state"]) for v in verdicts] == [("a", "Healthy")]
    assert not_healthy(verdicts) == []


def test_one_role_that_could_not_makes_the_node_unhealthy_and_says_why() -> None:
    verdicts = node_verdicts(["a", "b"], {"a": recorded("Healthy", "Unhealthy"), "b": recorded("Healthy")})
    assert verdicts[0]["reason"] == "it is Unhealthy"
    assert not_healthy(verdicts) == ["a"]


def test_a_failed_task_is_told_in_its_own_words() -> None:
    reason = HealthFilters().filters()["failure_reason"]
    assert reason({"failed": True, "msg": "no disk"}, "Install") == "Install: no disk"
    assert reason({"failed": True}, "Install") == "Install: failed"
    program = {"failed": True, "msg": "non-zero return code", "stderr": "MODEL-HASH: shard 2 is not the one\n"}
    assert reason(program, "Verify") == "Verify: MODEL-HASH: shard 2 is not the one"


def test_of_a_failed_loop_each_failed_item_is_told() -> None:
    items = [{"failed": True, "msg": "a is down"}, {"msg": "fine"}, {"failed": True, "msg": "c is down"}]
    result = {"failed": True, "msg": "One or more items failed", "results": items}
    assert HealthFilters().filters()["failure_reason"](result, "Verify") == "Verify: a is down; c is down"


@pytest.mark.parametrize("hostvars", [{}, {"node_health_recorded": []}, {"node_health_recorded": None}])
def test_a_node_that_was_not_reached_counts_as_unhealthy(hostvars: dict[str, Any]) -> None:
    verdicts = node_verdicts(["a"], {"a": hostvars})
    assert verdicts[0]["reason"] == "not reached, or lost before it said anything"
    assert not_healthy(verdicts) == ["a"]
