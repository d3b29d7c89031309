"""Who comes, who goes, whether the others can do without, and how far an exchange has come: without a node."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard.upgrade.membership import Pool, moves, replace_step
from gpuyard.upgrade.waves import Fleet, Model, Node, Policy, UpgradeError, refuse_leaving

CHAT = tuple(f"f-chat-{number}" for number in range(4))


def served(*names: str) -> dict[str, set[str]]:
    return {"f-gateway-0": set(names), "f-gateway-1": set(names)}


def test_a_fleet_that_is_as_its_spec_says_has_nothing_to_do() -> None:
    found = moves([Pool("chat", 4, CHAT)], served(*CHAT))
    assert (found.coming, found.going, dict(found.missing), found.forgotten) == ((), (), {}, ())
    assert found.lines == ["Nobody comes and nobody goes: the fleet is as its spec says."]


def test_the_machines_behind_the_last_wanted_one_go_the_last_one_first() -> None:
    found = moves([Pool("chat", 2, CHAT)], served(*CHAT))
    assert found.going == ("f-chat-3", "f-chat-2")
    assert found.coming == ()
    assert found.lines == ["goes: f-chat-3", "goes: f-chat-2"]


def test_a_machine_that_any_gateway_does_not_know_comes() -> None:
    one_has_it = {"f-gateway-0": set(CHAT), "f-gateway-1": set(CHAT[:3])}
    assert moves([Pool("chat", 4, CHAT)], one_has_it).coming == ("f-chat-3",)
    assert moves([Pool("chat", 4, CHAT)], served(*CHAT[:2])).coming == CHAT[2:]


def test_one_that_would_go_again_does_not_come() -> None:
    found = moves([Pool("chat", 3, CHAT)], served(*CHAT[:3]))
    assert (found.coming, found.going) == ((), ("f-chat-3",))


def test_machines_that_are_still_to_be_made_are_counted_and_those_that_are_gone_are_named() -> None:
    found = moves([Pool("chat", 6, CHAT), Pool("code", 1, ("f-code-0",))], served(*CHAT, "f-code-0", "f-code-1"))
    assert dict(found.missing) == {"chat": 2}
    assert found.forgotten == ("f-code-1",)
    assert found.lines == ["to be made: 2 of pool chat", "gone, and still behind a gateway: f-code-1"]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.sets(st.integers(0, 7)))
def test_walking_what_is_told_comes_to_the_spec(wanted: int, there: int, known: set[int]) -> None:
    def name(number: int) -> str:
        return f"f-chat-{number}"

    machines = tuple(map(name, range(there)))
    if not machines:
        return
    found = moves([Pool("chat", wanted, machines)], served(*map(name, known)))
    assert not set(found.coming) & set(found.going)
    after = (set(machines) - set(found.going)) | set(map(name, range(there, there + found.missing.get("chat", 0))))
    assert after == set(map(name, range(wanted)))
    # Once those are in and those that are gone are out, the gateways know who stays, and who is still to go.
    behind = (set(map(name, known)) | set(found.coming)) - set(found.forgotten)
    assert set(machines) - set(found.going) <= behind <= set(machines)


# --- whether the others can do without ---


def node(number: int, serves: bool = True) -> Node:
    return Node(f"n{number}", "chat", "upgrade-required", serves)


def leave(count: int, serving: int, requests: int = 0, accept: bool = False) -> None:
    models = [Model("m", "chat", requests, 10)]
    going = [node(number) for number in range(count)]
    refuse_leaving(going, Fleet(serving, {"chat": serving}), models, Policy(accept_downtime=accept))


def test_nodes_leave_where_the_others_have_seats_for_the_requests_of_now() -> None:
    leave(1, serving=3, requests=20)
    leave(2, serving=3, requests=10)


def test_nodes_that_are_needed_do_not_leave() -> None:
    with pytest.raises(UpgradeError, match=r"UPGRADE-CAPACITY: 21 requests .*2 are left, 10 seats each: 20"):
        leave(1, serving=3, requests=21)
    # Together: one after the other each would pass.
    with pytest.raises(UpgradeError, match="UPGRADE-CAPACITY") as refused:
        leave(2, serving=3, requests=15)
    assert "upgrade_max_unavailable" not in str(refused.value), "it would not help: they do not come back"
    leave(1, serving=3, requests=21, accept=True)


def test_the_last_node_of_a_pool_leaves_with_consent_alone() -> None:
    with pytest.raises(UpgradeError, match=r"UPGRADE-DOWNTIME: n0 .*upgrade_accept_downtime=true"):
        leave(1, serving=1)
    with pytest.raises(UpgradeError, match="UPGRADE-DOWNTIME"):
        leave(2, serving=2)
    leave(1, serving=1, accept=True)


def test_a_node_that_serves_nobody_may_always_leave() -> None:
    refuse_leaving([node(0, serves=False)], Fleet(1, {"chat": 0}), [Model("m", "chat", 99, 10)], Policy())


# --- the exchange of a machine ---

LEAVING = {"state": "leaving", "machine": "old"}
REPLACED = {"state": "replaced", "machine": "old", "new": "new"}


@pytest.mark.parametrize(
    ("note", "machine", "again", "step"),
    [
        (None, "old", False, "drain"),
        (None, "", False, "drain"),
        (LEAVING, "old", False, "wait"),
        (LEAVING, "old", True, "wait"),
        (LEAVING, "", False, "wait"),
        (LEAVING, "new", False, "bring in"),
        # Nobody knows who it was: who answers now is brought to the lock and has to prove itself.
        ({"state": "leaving", "machine": ""}, "old", False, "bring in"),
        ({"state": "leaving", "machine": ""}, "", False, "wait"),
        (REPLACED, "new", False, "done"),
        (REPLACED, "new", True, "drain"),
        (REPLACED, "third", False, "drain"),
        (REPLACED, "", False, "drain"),
    ],
)
def test_an_exchange_goes_on_where_it_was(note: dict[str, str] | None, machine: str, again: bool, step: str) -> None:
    assert replace_step(note, machine, again) == step
