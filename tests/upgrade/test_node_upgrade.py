"""The table of states and the note, without a node."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuyard.upgrade.report import COLOURS
from plugins.filter.upgrade import not_settled, rollback_to
from plugins.module_utils import kept_note
from plugins.module_utils.kept_note import NoteError, write
from plugins.module_utils.node_upgrade import (
    AT_REST,
    EXCHANGES,
    KINDS,
    TABLES,
    VERSION,
    advance,
    begin,
    follows,
    installed,
    pinned,
    refuse_beside,
    refuse_lost,
    way_back,
)
from plugins.module_utils.rollout import LEASE_SECONDS

PROJECT = Path(__file__).parents[2]
WALK = PROJECT / "playbooks/operate/tasks/change_node.yml"
RUN = "20261125T060000Z-driver-abcd"
ANNA = {"name": "anna", "host": "desk", "pid": 7, "started": "b/1", "machine": "m", "pids": "pid:[1]"}
BERT = {**ANNA, "name": "bert", "pid": 9, "started": "b/2"}
MINE: dict[str, Any] = {"run": RUN, "operator": ANNA}
# What a role does to a node, so that two must never do it at once; all else looks, or writes what nobody reads.
ACTS = {"node_gate/drain", "node_gate/uncordon", "vllm_server/stop", "vllm_server/start", "vllm_server/configure"}
ACTS |= {"vllm_server/record", "vllm_server/keep"}
ACTS |= {"vllm_server/restore", "nvidia_driver/unload", "nvidia_driver/install", "nvidia_driver/load"}
ACTS |= {"node_kernel/restart", "node_kernel/restore", "node_kernel/confirm", "node_kernel/forget"}
OLD: dict[str, Any] = {
    "version": "580.105.08",
    "kernel_modules": "open",
    "packages": {"nvidia-kernel-open-dkms": "580.105.08-1"},
}
NEW: dict[str, Any] = {
    "version": "580.126.20",
    "kernel_modules": "open",
    "packages": {"nvidia-kernel-open-dkms": "580.126.20-1"},
}
OTHER: dict[str, Any] = {
    "version": "590.48.01",
    "kernel_modules": "open",
    "packages": {"nvidia-kernel-open-dkms": "590.48.01-1"},
}


def begun(
    note: dict[str, Any] | None = None, target: dict[str, Any] = NEW, previous: dict[str, Any] = OLD
) -> dict[str, Any]:
    return begin(note, kind="driver", node="a-chat-0", **MINE, target=target, previous=previous)


def moved(note: dict[str, Any], to: str, **more: Any) -> dict[str, Any]:
    return advance(note, to, **MINE, **more)


def read(path: Path) -> dict[str, Any] | None:
    return kept_note.read(path, VERSION)


def at(state: str) -> dict[str, Any]:
    return {**begun(), "state": state}


# --- the table ---

by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
def test_every_edge_leads_to_a_state_of_the_table(kind: str) -> None:
    for state, step in TABLES[kind].items():
        assert {step.success, step.failure} <= set(TABLES[kind]), state


@by_kind
def test_every_state_comes_to_rest_whatever_fails(kind: str) -> None:
    for state in TABLES[kind]:
        seen, left = set(), {state}
        while left:
            seen |= left
            left = {after for one in left for after in follows(kind, one)} - seen
        assert set(AT_REST) & seen, state


@by_kind
def test_failures_on_the_way_lead_home_and_a_failed_way_home_leads_nowhere_else(kind: str) -> None:
    table = TABLES[kind]
    going = [state for state in table if state not in (*AT_REST, "upgrade-required", "rollback-required")]
    assert {table[state].failure for state in going} == {"rollback-required"}
    assert table["rollback-required"].failure == "rollback-failed"
    assert follows(kind, "rollback-failed") == {"rollback-failed"}


@by_kind
def test_every_step_has_hands(kind: str) -> None:
    for step in TABLES[kind].values():
        for does in step.does:
            role, verb = does.split("/")
            assert (PROJECT / "roles" / role / "tasks" / f"{verb}.yml").is_file(), does


def test_every_state_has_a_colour_of_its_own_kind() -> None:
    assert set(COLOURS) == {state for table in TABLES.values() for state in table}


def walked(tasks: list[dict[str, Any]], kind: str, folder: Path = WALK.parent, held: bool = False) -> list[str]:
    """The verbs of roles and the states that a list of tasks goes through for one kind of change, in its order.

    With `held` also where it sees that nobody has taken the node over.
    """
    found: list[str] = []
    for task in tasks:
        condition = str(task.get("when", ""))
        asked = re.findall(r"upgrade_kind (==|!=) '(\w+)'", condition)
        assert len(asked) == condition.count("upgrade_kind"), f"not read: {condition}"
        if any((other == kind) != (word == "==") for word, other in asked):
            continue
        if "block" in task:
            found += walked(task["block"], kind, folder, held)
        elif role := task.get("ansible.builtin.include_role"):
            found.append(f"{role['name'].split('.')[-1]}/{role['tasks_from']}")
        elif note := task.get("gpuyard.fleet.node_upgrade"):
            if note.get("held"):
                found += ["held"] * held
                continue
            found.append(EXCHANGES[kind].state if note["to"] == "{{ upgrade_exchange }}" else note["to"])
        elif named := task.get("ansible.builtin.include_tasks"):
            file = folder / named.replace("{{ upgrade_kind }}", kind)
            found += walked(yaml.safe_load(file.read_text()), kind, file.parent, held)
    return found


@by_kind
def test_the_playbook_walks_the_table_and_nothing_else(kind: str) -> None:
    halt, held, look, begin_it, task, left = yaml.safe_load(WALK.read_text())
    assert held["gpuyard.fleet.rollout"]["state"] == "held", "who lost the fleet, or is to pause, begins no node"
    assert "ansible.builtin.assert" in halt
    assert left["gpuyard.fleet.rollout"]["node"] == held["gpuyard.fleet.rollout"]["node"]
    assert f"'{kind}': '{EXCHANGES[kind].state}'" in task["vars"]["upgrade_exchange"]
    assert walked([look, begin_it], kind) == ["node_gate/servers", "drain-required"]
    table: list[str] = []
    state = "upgrade-required"
    while state not in AT_REST:
        table += [*TABLES[kind][state].does, TABLES[kind][state].success]
        state = TABLES[kind][state].success
    assert ["drain-required", *walked(task["block"], kind)] == table
    back = walked(task["rescue"], kind)
    step = TABLES[kind]["rollback-required"]
    assert back == ["rollback-required", "node_gate/drain", *step.does, "rollback-done"]
    (way_back,) = [task for task in task["rescue"] if "block" in task]
    assert walked(way_back["rescue"], kind) == ["rollback-failed"]


# --- the note ---


def test_a_node_with_the_target_has_nothing_to_do() -> None:
    note = begun(previous=NEW)
    assert note["state"] == "upgrade-done"
    assert begun(note, previous=NEW) is note, "a second run writes nothing"


def test_what_the_node_came_from_outlives_a_crash_though_its_packages_are_new_by_then() -> None:
    note = moved(moved(begun(), "drain-required"), "driver-install-required")
    again = begun(note, previous=NEW)
    assert (again["state"], again["previous"], again["attempts"]) == ("driver-install-required", OLD, 2)


def test_another_driver_is_refused_while_one_is_on_its_way() -> None:
    with pytest.raises(NoteError, match=r"UPGRADE-OTHER.*580\.126\.20 stands at validation-required"):
        begun(at("validation-required"), target=OTHER)
    assert begun(at("upgrade-required"), target=OTHER)["target"] == OTHER, "nothing was touched yet"
    assert begun(at("rollback-done"), target=OTHER)["state"] == "upgrade-required"


def test_a_node_in_quarantine_is_not_tried_again_with_the_same_driver() -> None:
    with pytest.raises(NoteError, match="UPGRADE-QUARANTINE"):
        begun(at("rollback-failed"))
    assert begun(at("rollback-done"))["state"] == "upgrade-required", "one that came back whole is"


def test_the_note_of_another_node_is_refused() -> None:
    with pytest.raises(NoteError, match="UPGRADE-FOREIGN"):
        begin(begun(), kind="driver", node="b-chat-0", **MINE, target=NEW, previous=OLD)


def test_the_mark_of_the_new_driver_outlives_whoever_set_it() -> None:
    marked = moved(at("driver-install-required"), "validation-required", xid_since="s=1;i=2")
    later = moved(marked, "uncordon-required")
    assert marked["xid_since"] == later["xid_since"] == "s=1;i=2"


def test_a_step_that_the_table_does_not_have_is_refused() -> None:
    with pytest.raises(NoteError, match="UPGRADE-STATE"):
        moved(begun(), "uncordon-required")


def test_a_node_is_touched_from_the_moment_its_driver_is_exchanged() -> None:
    note = moved(begun(), "drain-required")
    assert not moved(note, "rollback-required")["touched"], "there is nothing to undo"
    note = moved(note, "driver-install-required")
    assert note["touched"]
    assert moved(moved(note, "validation-required"), "rollback-required")["touched"]


def test_a_run_that_lost_a_node_moves_it_no_more() -> None:
    note = moved(begun(), "drain-required")
    taken = begin(note, kind="driver", node="a-chat-0", run="another", operator=ANNA, target=NEW, previous=OLD)
    with pytest.raises(NoteError, match=r"UPGRADE-FENCED.*another"):
        moved(taken, "driver-install-required")
    assert advance(taken, "driver-install-required", run="another", operator=ANNA)["touched"]


def test_who_wakes_after_another_one_took_over_his_run_moves_nothing_more_and_does_nothing_more() -> None:
    """A run that is taken over keeps its name, so that its record is one: the name alone fences nobody."""
    note = moved(begun(), "drain-required")
    taken = begin(note, kind="driver", node="a-chat-0", run=RUN, operator=BERT, target=NEW, previous=OLD)
    with pytest.raises(
        NoteError, match=r"UPGRADE-FENCED: a-chat-0 is changed by bert@desk \(process 9\).*process 7 on"
    ):
        moved(taken, "driver-install-required")
    with pytest.raises(NoteError, match="UPGRADE-FENCED"):
        refuse_lost(taken, **MINE)
    refuse_lost(taken, run=RUN, operator=BERT)
    with pytest.raises(NoteError, match="UPGRADE-FENCED"):
        refuse_lost({**note, "operator": None}, **MINE)  # as an older gpuyard wrote it: whoever begins puts in his


@by_kind
def test_whatever_is_done_to_a_node_is_done_by_who_has_just_seen_that_it_is_his(kind: str) -> None:
    (task,) = [task for task in yaml.safe_load(WALK.read_text()) if "rescue" in task]
    for way in (task["block"], task["rescue"]):
        words = walked(way, kind, held=True)
        assert ACTS & set(words)
        for before, word in pairwise(["", *words]):
            assert word not in ACTS or before == "held" or before in TABLES[kind], f"{word} behind {before}"


def test_who_goes_back_twice_stays_there() -> None:
    done = {**begun(), "state": "upgrade-done"}
    assert way_back(done) == OLD
    words = {"kind": "driver", "node": "a-chat-0", **MINE}
    back = begin(done, target=OLD, previous=NEW, back=True, **words)
    assert way_back(back) == OLD
    refused = {**begun(done, target=OTHER, previous=NEW), "state": "rollback-done"}
    assert way_back(refused) == OLD, "what never came is nothing to go back from"
    for none in (None, begun(previous=NEW), begun()):
        with pytest.raises(NoteError, match="UPGRADE-NOTHING-BACK"):
            way_back(none)


def test_a_fleet_whose_rollout_was_halted_goes_back_from_where_it_came_and_no_further() -> None:
    """From OLD to NEW once, all of it; then to OTHER: a is there, b went back, c was not touched."""
    before = {**begun(), "state": "upgrade-done"}
    notes = {
        "a": {**begun(before, target=OTHER, previous=NEW), "state": "upgrade-done"},
        "b": {**begun(before, target=OTHER, previous=NEW), "state": "rollback-done"},
        "c": begun(before, target=OTHER, previous=NEW),
    }

    def to(*names: str) -> dict[str, Any]:
        told = {name: {"rollback_note": {"note": note, "way_back": way_back(note)}} for name, note in notes.items()}
        return {name: rollback_to(name, names, told) for name in names}

    assert to("a", "b", "c") == {"a": NEW, "b": NEW, "c": NEW}
    assert to("b", "c") == {"b": OLD, "c": OLD}, "nobody is at the other one: the rollout before is the last that came"
    notes["a"] = {**begun(notes["a"], target=NEW, previous=OTHER), "back": True}
    assert to("a", "b", "c") == {"a": NEW, "b": NEW, "c": NEW}, "also when it was broken off and is gone on with"


@by_kind
def test_a_node_is_opened_by_hand_only_where_no_change_is_on_its_way(kind: str) -> None:
    notes = [{"kind": kind, "state": state} for state in TABLES[kind]]
    shut = {note["state"] for note in not_settled([None, *notes])}
    assert set(TABLES[kind]) - shut == {"upgrade-required", "upgrade-done", "rollback-done"}
    assert not_settled([None, None, None]) == []


@by_kind
def test_every_state_that_is_not_rest_has_a_deadline(kind: str) -> None:
    assert {state for state, step in TABLES[kind].items() if not step.deadline} == {"upgrade-required", *AT_REST}


@by_kind
def test_no_owner_who_lives_is_silent_for_longer_than_a_claim_is_believed(kind: str) -> None:
    table, hear = TABLES[kind], "hear.yml"
    (task,) = [task for task in yaml.safe_load(WALK.read_text()) if "rescue" in task]
    (forward,) = [task["block"] for task in task["block"] if "block" in task]
    (home,) = [task["block"] for task in task["rescue"] if "block" in task]
    soak = yaml.safe_load((WALK.parent / "soak.yml").read_text())
    ready = (WALK.parent / kind / "begin.yml").read_text()
    assert ready.index("build" if kind != "engine" else "install") < ready.index(hear), "a build may take an hour"
    drained, exchanged = (
        next(number for number, task in enumerate(forward) if word in str(task)) for word in ("drain", "exchange.yml")
    )
    assert hear in str(forward[drained:exchanged]), "a drain may take an hour"
    assert hear in str(task["rescue"][:2])
    assert hear in str(home[0])
    assert hear in str(soak[:2]), "a soak may be as long as anybody likes"
    proven = table["validation-required"].deadline + table["uncordon-required"].deadline
    assert table["drain-required"].deadline < LEASE_SECONDS
    assert EXCHANGES[kind].deadline + proven < LEASE_SECONDS


def test_one_kind_of_change_at_a_time() -> None:
    resting = ("upgrade-required", "upgrade-done", "rollback-done")
    for state in TABLES["driver"]:
        others = {"driver": at(state)}
        if state in resting:
            refuse_beside("engine", "a-chat-0", others)
        else:
            with pytest.raises(NoteError, match=f"UPGRADE-OTHER: a change of the driver of a-chat-0 stands at {state}"):
                refuse_beside("engine", "a-chat-0", others)
    refuse_beside("engine", "a-chat-0", {"driver": None})


def test_a_node_is_touched_from_the_moment_its_engines_are_exchanged() -> None:
    new, old = {"version": "vllm-2", "settings": "b"}, {"version": "vllm-1", "environments": {"m": "vllm-1"}}
    note = begin(None, kind="engine", node="a-chat-0", **MINE, target=new, previous=old)
    note = moved(note, "drain-required")
    assert not note["touched"]
    assert moved(note, "service-stop-required")["touched"]
    with pytest.raises(NoteError, match="UPGRADE-STATE"):
        moved(note, "driver-install-required")


def test_a_node_is_touched_from_the_moment_it_is_rebooted_and_what_it_came_from_is_the_kernel_it_ran() -> None:
    new, old = {"version": "6.1.0-57-amd64", "packages": {}}, {"version": "6.1.0-50-amd64", "packages": {}, "held": []}
    words = {"kind": "kernel", "node": "a-chat-0", **MINE, "target": new}
    note = moved(begin(None, previous=old, **words), "drain-required")
    assert not moved(note, "rollback-required")["touched"], "the new kernel lies beside the old one, and was not booted"
    booted = moved(note, "reboot-required")
    assert booted["touched"]
    assert begin(booted, previous=new, **words)["previous"] == old, "it runs the new one by then"
    assert begin(None, previous=new, **words)["state"] == "upgrade-done"


def test_a_kernel_stays_when_it_is_proven_and_the_old_one_goes_when_it_was_watched() -> None:
    table = TABLES["kernel"]
    assert table["validation-required"].does[-1] == "node_kernel/confirm"
    assert table["soak-required"].does[-1] == "node_kernel/forget"
    for state in set(table) - {"soak-required"}:
        assert "node_kernel/forget" not in table[state].does, state


def test_only_the_first_look_says_whether_somebody_else_had_drained_the_node() -> None:
    note = moved(begun(), "drain-required", drained_before=True)
    assert note["drained_before"] is True
    assert moved(note, "drain-required", drained_before=False)["drained_before"] is True


def test_only_a_node_that_was_watched_to_the_end_was_watched() -> None:
    assert not moved(at("soak-required"), "upgrade-done")["watched"]
    done = moved(at("soak-required"), "upgrade-done", watched=True)
    assert done["watched"]
    assert begun(done, previous=NEW)["watched"], "it is asked again in a later run"
    assert not begun(done, target=OTHER, previous=NEW)["watched"], "with another driver it is no canary"
    assert not begun(previous=NEW)["watched"], "it was installed, and nobody looked"


def test_a_note_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep/note.json"
    assert read(path) is None
    write(path, begun())
    assert read(path) == begun()
    assert [file.name for file in path.parent.iterdir()] == ["note.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("upgrade-required", "upgrade-done"),
        lambda text: text.replace("580.105.08", "580.126.20"),
        lambda text: text.replace('"version": 2,', '"version": 3,'),
        lambda text: text[:-20],
        lambda _: "[]",
        lambda _: "",
    ],
)
def test_a_note_that_was_not_written_so_is_refused(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "note.json"
    write(path, begun())
    path.write_text(spoil(path.read_text()))
    with pytest.raises(NoteError, match="UPGRADE-NOTE"):
        read(path)


def test_what_a_node_has_is_read_from_its_pins(tmp_path: Path) -> None:
    pins = tmp_path / "pins.pref"
    pins.write_text(
        "# Managed by gpuyard.\n\nPackage: nvidia-driver-pinning-580\nPin: version 580-1\nPin-Priority: 1001\n\n"
        "Package: nvidia-kernel-dkms\nPin: version 580.126.20-1\nPin-Priority: 1001\n"
    )
    assert pinned(pins.read_text()) == {"nvidia-driver-pinning-580": "580-1", "nvidia-kernel-dkms": "580.126.20-1"}
    found = installed(pins)
    assert (found["version"], found["kernel_modules"]) == ("580.126.20", "proprietary")
    with pytest.raises(NoteError, match="UPGRADE-NOTHING"):
        installed(tmp_path / "none")


def test_the_role_and_the_note_know_the_same_flavours() -> None:
    from plugins.module_utils.node_upgrade import FLAVOURS

    own = yaml.safe_load((PROJECT / "roles/nvidia_driver/vars/main.yml").read_text())["__nvidia_driver_flavours"]
    for name in (
        "nvidia-kernel-open-dkms",
        "nvidia-dkms-580-open",
        "nvidia-kernel-dkms",
        "nvidia-dkms-580",
        "libcuda1",
    ):
        assert {flavour for flavour, pattern in FLAVOURS.items() if re.fullmatch(pattern, name)} == {
            flavour for flavour, pattern in own.items() if re.match(pattern, name)
        }
