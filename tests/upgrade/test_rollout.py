"""Who may change a fleet, who goes when, and the record of it: without a node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard.upgrade import record
from gpuyard.upgrade.operator import gone, own_operator, started
from gpuyard.upgrade.waves import Fleet, Model, Node, Policy, UpgradeError, Wave, at_once, refuse_overload, waves
from plugins.module_utils.kept_note import NoteError
from plugins.module_utils.rollout import LEASE_SECONDS, Clock, claimed, heard, held, paused, released

NOW = Clock("boot-1", 1000.0)
ANNA = {"name": "anna", "host": "desk", "pid": 7, "started": "b/1"}
BERT = {"name": "bert", "host": "other", "pid": 9, "started": "b/2"}


def ask(claim: Any, operator: Any = ANNA, run: str = "r1", target: str = "590.1", **more: Any) -> dict[str, Any]:
    wish = {"fleet": "f", "run": run, "kind": "driver", "target": target, "operator": operator, "begun": "now"}
    words = {"clock": NOW, "gone": False, "take_over": False, "resume": False, **more}
    return claimed(claim, wish=wish, **words)


# --- the claim ---


def test_one_of_two_operators_wins_and_the_other_is_told_who_did() -> None:
    mine = ask(None)
    with pytest.raises(NoteError, match=r"UPGRADE-TWO: anna@desk \(process 7\).*run r1"):
        ask(mine, BERT, run="r2")


def test_a_claim_whose_owner_is_gone_goes_on_under_its_own_run() -> None:
    mine = ask(None)
    late = Clock("boot-1", 1000.0 + LEASE_SECONDS)
    later = Clock("boot-2", float(LEASE_SECONDS))
    for more in ({"gone": True}, {"take_over": True}, {"clock": late}, {"clock": later}):
        taken = ask(mine, BERT, run="r2", **more)
        assert (taken["run"], taken["operator"]) == ("r1", BERT), more
        with pytest.raises(NoteError, match="UPGRADE-FENCED"):
            held(taken, run="r1", operator=ANNA, clock=NOW, node="n1")
    with pytest.raises(NoteError, match="UPGRADE-TWO"):
        ask(mine, BERT, clock=Clock("boot-1", 999.0 + LEASE_SECONDS))
    with pytest.raises(NoteError, match="UPGRADE-TWO"):
        # The gateway was restarted: nothing is known of the owner, so it is believed.
        ask(mine, BERT, clock=Clock("boot-2", 1.0))


def test_to_another_driver_it_is_another_run() -> None:
    assert ask(ask(None), run="r2", target="600.1")["run"] == "r2"
    assert ask(released(ask(None), run="r1", operator=ANNA, result="done"), run="r2")["run"] == "r2"


def test_a_paused_run_stops_before_its_next_node_and_goes_on_when_told() -> None:
    waiting = paused(ask(None), "r1")
    with pytest.raises(NoteError, match=r"UPGRADE-PAUSED: run r1.*upgrade_resume=true"):
        held(waiting, run="r1", operator=ANNA, clock=NOW, node="n1")
    with pytest.raises(NoteError, match="UPGRADE-PAUSED"):
        ask(waiting)
    assert ask(waiting, resume=True)["paused"] is False


def test_what_does_not_run_is_not_paused() -> None:
    for claim, run in (
        (None, ""),
        (released(ask(None), run="r1", operator=ANNA, result="done"), ""),
        (ask(None), "r9"),
    ):
        with pytest.raises(NoteError, match="UPGRADE-NOT-RUNNING"):
            paused(claim, run)


def test_nobody_gives_back_what_another_one_holds() -> None:
    mine = ask(None)
    assert released(mine, run="r1", operator=BERT, result="done") == mine


def test_a_rollout_that_a_node_has_halted_is_not_done_for_the_others() -> None:
    halted = released(ask(None), run="r1", operator=ANNA, result="halted")
    assert halted
    assert halted["result"] == "halted"
    assert released(halted, run="r1", operator=ANNA, result="done") == halted


def test_a_node_that_fails_lets_no_other_begin_and_the_fleet_is_held_until_the_last_of_its_batch_has_ended() -> None:
    who: dict[str, Any] = {"run": "r1", "operator": ANNA}
    claim: Any = ask(None)
    for node in "abc":
        claim = held(claim, **who, clock=NOW, node=node)
    claim = released(claim, **who, result="halted", node="a")
    assert claim["result"] == ""
    with pytest.raises(NoteError, match=r"UPGRADE-HALTED: d was not touched"):
        held(claim, **who, clock=NOW, node="d")
    with pytest.raises(NoteError, match="UPGRADE-TWO"):
        ask(claim, BERT, run="r2")
    heard(claim, **who, clock=NOW)
    claim = released(claim, **who, result="done", node="b")
    assert (claim["nodes"], claim["result"]) == (["c"], "")
    assert released(claim, **who, result="done")["result"] == "halted", "the last play gives back what it finds halting"
    claim = released(claim, **who, result="done", node="c")
    assert claim["result"] == "halted"
    assert ask(claim, BERT, run="r2")["nodes"] == []


def test_a_node_that_is_done_gives_nothing_back() -> None:
    claim = held(ask(None), run="r1", operator=ANNA, clock=NOW, node="a")
    after = released(claim, run="r1", operator=ANNA, result="done", node="a")
    assert after
    assert (after["nodes"], after["result"], after["halting"]) == ([], "", False)


def test_the_claim_of_another_fleet_is_refused() -> None:
    with pytest.raises(NoteError, match="UPGRADE-FOREIGN"):
        ask({**ask(None), "fleet": "g"})


# --- who is dead ---

HERE = {"name": "anna", "host": "desk", "pid": 7, "started": "b1/100", "machine": "m1", "pids": "pid:[1]"}


@pytest.mark.parametrize(
    ("owner", "now", "dead"),
    [
        ({}, "", True),
        ({}, "b1/900", True),  # its pid was used again
        ({}, "b1/100", False),
        ({"started": "b0/100"}, "", True),  # the machine has booted since
        ({"host": "other"}, "", False),
        ({"machine": "m2", "started": "b2/100"}, "", False),  # two controllers of one host name
        ({"pids": "pid:[2]"}, "", False),  # two containers of one kernel
    ],
)
def test_an_operator_is_dead_only_where_a_missing_pid_can_say_so(owner: dict[str, Any], now: str, dead: bool) -> None:
    assert gone({**HERE, **owner}, HERE, now) is dead


def test_without_an_id_of_the_machine_only_the_same_boot_says_who_is_dead() -> None:
    here = {**HERE, "machine": ""}
    assert gone(here, here, "")
    assert not gone({**here, "started": "b0/100"}, here, ""), "two containers of one name on two hosts"
    of_old = {name: HERE[name] for name in ("name", "host", "pid", "started")}
    assert not gone(of_old, HERE, ""), "a claim of an older gpuyard does not say where its owner was"


def test_whoever_asks_lives() -> None:
    me = own_operator()
    assert me["started"]
    assert not gone(me, me, started(me["pid"]))


# --- the waves ---


def fleet(*sizes: int, **more: Any) -> list[Node]:
    return [
        Node(f"p{pool}-{number}", f"p{pool}", "upgrade-required", **more)
        for pool, size in enumerate(sizes)
        for number in range(size)
    ]


def plan(nodes: list[Node], **policy: Any) -> list[Wave]:
    serving: dict[str, int] = {}
    for node in nodes:
        serving[node.pool] = serving.get(node.pool, 0) + node.serves
    return waves(nodes, Fleet(len(nodes), serving), Policy(**policy))


def test_a_canary_then_batches() -> None:
    assert [(wave.name, len(wave.nodes)) for wave in plan(fleet(9))] == [
        ("canary 1", 1), *[(f"batch {n}", 2) for n in range(1, 5)],
    ]  # fmt: skip
    assert [len(wave.nodes) for wave in plan(fleet(3))] == [1, 1, 1]
    assert [len(wave.nodes) for wave in plan(fleet(8), canary=0, max_unavailable="3")] == [3, 3, 2]


def test_what_was_begun_is_ended_first_and_a_canary_sings_once() -> None:
    nodes = fleet(5)
    nodes[3] = Node("p0-3", "p0", "validation-required", serves=False)
    nodes[4] = Node("p0-4", "p0", "upgrade-done", watched=True)
    assert [(wave.name, wave.nodes[0]) for wave in plan(nodes)] == [
        ("begun", "p0-3"), ("batch 1", "p0-0"), ("batch 2", "p0-1"), ("batch 3", "p0-2"),
    ]  # fmt: skip
    assert plan([Node("a", "p", "upgrade-done"), Node("b", "p", "upgrade-done")]) == []


def test_a_canary_that_was_interrupted_is_watched_when_it_is_ended() -> None:
    nodes = fleet(5)
    nodes[0] = Node("p0-0", "p0", "validation-required", serves=False)
    begun, *others = plan(nodes)
    assert (begun.name, begun.watched) == ("begun", ("p0-0",))
    assert [wave.watched for wave in others] == [(), (), (), ()]
    assert [wave.watched for wave in plan(nodes, canary=2)[:3]] == [("p0-0",), ("p0-1",), ()]
    # A node that goes back, or one that is not opened again, shows nothing: another one is the canary.
    for found in (replace(nodes[0], state="rollback-required"), replace(nodes[0], stays_out=True)):
        assert [wave.watched for wave in plan([found, *nodes[1:]])[:3]] == [(), ("p0-1",), ()]


def test_a_node_that_site_yml_brought_to_the_new_one_was_no_canary() -> None:
    nodes = fleet(5)
    nodes[4] = Node("p0-4", "p0", "upgrade-done")
    assert plan(nodes)[0] == Wave("canary 1", ("p0-0",), ("p0-0",))


def test_a_batch_is_of_one_failure_domain() -> None:
    nodes = [Node(f"n{i}", "p", "upgrade-required", domain="ab"[i % 2]) for i in range(6)]
    assert [wave.nodes for wave in plan(nodes, canary=0, max_unavailable="3")] == [
        ("n0", "n2", "n4"),
        ("n1", "n3", "n5"),
    ]


def test_nodes_that_are_out_already_count_and_come_last() -> None:
    nodes = fleet(8)
    nodes[0] = Node("p0-0", "p0", "upgrade-required", serves=False)
    found = plan(nodes, canary=0, max_unavailable="3")
    assert [len(wave.nodes) for wave in found] == [2, 2, 2, 1, 1]
    assert found[-1] == Wave("out of service", ("p0-0",))


@pytest.mark.parametrize(
    ("nodes", "policy", "rule"),
    [
        (1, {}, "UPGRADE-DOWNTIME"),
        (4, {"max_unavailable": "4"}, "UPGRADE-DOWNTIME"),
        (4, {"max_unavailable": "100%"}, "UPGRADE-DOWNTIME"),
        (4, {"max_unavailable": "0"}, "UPGRADE-UNAVAILABLE"),
        (4, {"max_unavailable": "0%"}, "UPGRADE-UNAVAILABLE"),
        (4, {"max_unavailable": "101%"}, "UPGRADE-UNAVAILABLE"),
        (4, {"max_unavailable": "-1"}, "UPGRADE-UNAVAILABLE"),
        (4, {"max_unavailable": "many"}, "UPGRADE-UNAVAILABLE"),
    ],
)
def test_what_would_leave_nobody_is_refused(nodes: int, policy: dict[str, Any], rule: str) -> None:
    with pytest.raises(UpgradeError, match=rule):
        plan(fleet(nodes), **policy)


def test_a_pool_of_two_goes_on_though_the_node_that_was_begun_is_out_until_it_is_ended() -> None:
    """Rehearsed: its operator was killed with the first node empty, and the same command was refused."""
    begun = Node("p0-0", "p0", "driver-install-required", serves=False)
    nodes = [begun, Node("p0-1", "p0", "upgrade-required")]
    there = Fleet(2, {"p0": 1})
    assert [wave.nodes for wave in waves(nodes, there, Policy())] == [("p0-0",), ("p0-1",)]
    load = [Model("m", "p0", 100, 64)]
    with pytest.raises(UpgradeError, match=r"1 of 2 nodes out, 1 are left.*64 seats each: 64"):
        refuse_overload(waves(nodes, there, Policy()), nodes, there, load, Policy())
    # One that somebody else had taken out is not opened when it is done, and then the other one is the last.
    nodes[0] = replace(begun, stays_out=True)
    with pytest.raises(UpgradeError, match=r"UPGRADE-DOWNTIME: p0-1 is the only node"):
        waves(nodes, there, Policy())


def test_with_consent_a_fleet_of_one_is_upgraded() -> None:
    assert [wave.nodes for wave in plan(fleet(1), accept_downtime=True)] == [("p0-0",)]


def test_a_pool_of_one_needs_consent_however_large_the_fleet() -> None:
    with pytest.raises(UpgradeError, match=r"UPGRADE-DOWNTIME: p1-0 is the only node of pool p1 that serves"):
        plan(fleet(4, 1))


@given(
    sizes=st.lists(st.integers(min_value=2, max_value=9), min_size=1, max_size=4),
    canary=st.integers(min_value=0, max_value=3),
    share=st.integers(min_value=1, max_value=60),
    states=st.randoms(use_true_random=False),
)
def test_whatever_the_fleet_each_node_goes_once_and_no_pool_is_left_without(
    sizes: list[int], canary: int, share: int, states: Any
) -> None:
    nodes = [
        Node(
            node.name, node.pool, states.choice(["upgrade-required", "upgrade-required", "upgrade-done"]), True, domain
        )
        for node in fleet(*sizes)
        for domain in [states.choice("ab")]
    ]
    asked = Policy(canary=canary, max_unavailable=f"{share}%")
    found = plan(nodes, canary=canary, max_unavailable=f"{share}%")
    gone = [name for wave in found for name in wave.nodes]
    assert sorted(gone) == sorted(node.name for node in nodes if node.state == "upgrade-required")
    by_name = {node.name: node for node in nodes}
    for wave in found:
        assert len(wave.nodes) <= at_once(asked, len(nodes))
        assert len({by_name[name].domain for name in wave.nodes}) == 1
        for pool, size in enumerate(sizes):
            assert sum(by_name[name].pool == f"p{pool}" for name in wave.nodes) < size


def test_nodes_that_nobody_named_count_as_out_where_they_are_out() -> None:
    nodes = fleet(8)[:6]
    sizes = {
        away: [len(wave.nodes) for wave in waves(nodes, Fleet(8, {"p0": 8 - away}, away), Policy(0, "3"))]
        for away in (0, 1, 2)
    }
    assert sizes == {0: [3, 3], 1: [2, 2, 2], 2: [1] * 6}


def test_a_load_that_the_others_cannot_carry_is_refused_with_the_arithmetic() -> None:
    nodes = fleet(4)
    kinds = Fleet(4, {"p0": 4})
    found = [Wave("batch 1", ("p0-0", "p0-1"))]
    refuse_overload(found, nodes, kinds, [Model("m", "p0", 128, 64)], Policy())
    with pytest.raises(
        UpgradeError, match=r"UPGRADE-CAPACITY: 129 requests.*2 of 4 nodes out, 2 are left.*64 seats each: 128"
    ):
        refuse_overload(found, nodes, kinds, [Model("m", "p0", 129, 64)], Policy())
    refuse_overload(found, nodes, kinds, [Model("m", "p0", 129, 64)], Policy(accept_downtime=True))
    refuse_overload(found, nodes, kinds, [Model("m", "p0", 10**6, None)], Policy())


# --- the record ---


def written(path: Path) -> Path:
    for number in range(5):
        record.append(path, {"event": "state", "node": f"n{number}"})
    return path


def test_a_record_is_read_as_it_was_appended(tmp_path: Path) -> None:
    path = written(tmp_path / "run/record.jsonl")
    assert [event["node"] for event in record.read(path)] == [f"n{number}" for number in range(5)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines[:2], lines[2].replace("n2", "n9"), *lines[3:]],
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:2], lines[3], lines[2], lines[4]],
        lambda lines: [lines[1], *lines[1:]],
        lambda lines: [*lines[:2], "{}", *lines[2:]],
        lambda lines: [*lines[:2], "no JSON", *lines[3:]],
    ],
)
def test_a_line_that_was_changed_taken_out_or_put_in_is_seen(tmp_path: Path, spoil: Any) -> None:
    path = written(tmp_path / "record.jsonl")
    path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
    with pytest.raises(record.RecordError, match=r"RECORD-BROKEN.*line [1-5]"):
        record.read(path)


def test_half_a_last_line_is_of_a_writer_that_died_and_the_next_one_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "record.jsonl")
    with path.open("a") as file:
        file.write('{"n": 5, "at": "2')
    assert len(record.read(path)) == 5
    record.append(path, {"event": "state", "node": "n5"})
    assert [event["n"] for event in record.read(path)] == list(range(6))


def test_the_head_shows_what_was_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "record.jsonl")
    head = record.head_of(path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert record.read(path), "by itself the chain does not show it"
    assert record.head_of(path) != head
    assert json.loads(path.read_text().splitlines()[0])["before"] == record.BEGINNING
