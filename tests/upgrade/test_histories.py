"""Any history of a fleet in the pure model: operators who are killed or cut off, nodes and gateways that lose power.

The walk is that of playbooks/operate/tasks/change_node.yml, which test_node_upgrade.py holds against the table;
notes and claims are moved by the product's own functions. GPUYARD_HISTORIES has how many histories are tried;
`make bench-resume` tries 10,000 and prints what was in them.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from plugins.module_utils.kept_note import NoteError
from plugins.module_utils.node_upgrade import AT_REST, TABLES, advance, begin, refuse_lost
from plugins.module_utils.rollout import LEASE_SECONDS, Clock, claimed, held, released

HISTORIES = int(os.environ.get("GPUYARD_HISTORIES", "200"))
OLD: dict[str, Any] = {"version": "580.105.08", "kernel_modules": "open", "packages": {}}
NEW: dict[str, Any] = {"version": "590.44.01", "kernel_modules": "open", "packages": {}}
NAMES = ("a", "b", "c")
STEPS = TABLES["driver"]
# What is done by who has just seen that the node is his; test_node_upgrade.py holds the playbook against it.
LOOKS = ("vllm_server/verify", "vllm_server/compare", "nvidia_driver/verify", "node_health/mark")
FAULTS = ["nvidia_driver/install", "nvidia_driver/load", "nvidia_driver/verify", "vllm_server/compare"]
FAULTS += ["old nvidia_driver/install", "old nvidia_driver/verify", "old vllm_server/compare"]
SEEN: Counter[str] = Counter()


class TaskError(Exception):
    """A task of the playbook failed."""


@dataclass
class Node:
    """What is true of a node, whoever knows it."""

    name: str
    faults: frozenset[str]
    """Verbs that fail with the new driver; with "old " before it, those that fail with the old one."""
    foreign: bool
    """Somebody else has drained it."""
    has: dict[str, Any] = field(default_factory=lambda: OLD)
    loaded: str | None = OLD["version"]
    engines: bool = True
    open: bool = True
    proven: bool = True
    note: dict[str, Any] | None = None
    exchanges: Counter[str] = field(default_factory=Counter[str])


class Operator:
    """One run of the playbook, which can end between any two things that it does."""

    def __init__(self, fleet: Fleet, number: int, take_over: bool) -> None:
        self.fleet, self.take_over = fleet, take_over
        self.who = {"name": "anna", "host": f"desk{number}", "pid": number, "started": str(number)}
        self.run = f"r{number}"
        self.way = self.walk()
        self.going = True

    def step(self) -> None:
        try:
            next(self.way)
        except StopIteration:
            self.going = False
        except (TaskError, NoteError) as error:
            self.going = False  # the play ended with an error
            SEEN["fenced"] += "UPGRADE-FENCED" in str(error)

    def walk(self) -> Iterator[None]:
        fleet = self.fleet
        wish = {"fleet": "f", "run": self.run, "kind": "driver", "target": NEW["version"], "operator": self.who}
        gone = fleet.claim is not None and not fleet.alive(fleet.claim["operator"])
        words = {"clock": fleet.clock, "gone": gone, "take_over": self.take_over, "resume": True}
        fleet.claim = kept(claimed(fleet.claim, wish={**wish, "begun": "now"}, **words))
        self.run = fleet.claim["run"]
        yield
        for node in fleet.nodes:
            words = {"kind": "driver", "node": node.name, "run": self.run, "operator": self.who}
            node.note = kept(begin(node.note, target=NEW, previous=node.has, **words))
            yield
        for node in sorted(fleet.nodes, key=lambda node: node.note["state"] in (*AT_REST, "upgrade-required")):
            fleet.claim = kept(held(fleet.claim, run=self.run, operator=self.who, clock=fleet.clock, node=node.name))
            yield
            yield from self.change(node)
            fleet.claim = kept(released(fleet.claim, run=self.run, operator=self.who, result="done", node=node.name))
        fleet.claim = kept(released(fleet.claim, run=self.run, operator=self.who, result="done"))

    def change(self, node: Node) -> Iterator[None]:
        assert node.note
        state = node.note["state"]
        if state == "upgrade-done":
            return
        if state == "upgrade-required":
            self.move(node, "drain-required", drained_before=not node.open)
            yield
        try:
            yield from self.forward(node, state)
        except TaskError:
            self.move(node, "rollback-required")
            yield
            yield from self.back(node)
            fleet = self.fleet
            words = {"run": self.run, "operator": self.who, "node": node.name}
            fleet.claim = kept(released(fleet.claim, result="halted", **words))
            raise

    def forward(self, node: Node, state: str) -> Iterator[None]:
        if state == "rollback-required":
            raise TaskError
        if state != "soak-required":
            yield from self.do(node, "node_gate/drain")
            if state in ("upgrade-required", "drain-required", "driver-install-required"):
                if state != "driver-install-required":
                    yield from self.do(node, "vllm_server/record")
                self.move(node, "driver-install-required")
                yield
                yield from self.do(node, *STEPS["driver-install-required"].does)
                self.move(node, "validation-required")
                yield
            yield from self.do(node, *STEPS["validation-required"].does)
            self.move(node, "uncordon-required")
            yield
            assert node.note
            if not node.note["drained_before"]:
                yield from self.do(node, "node_gate/uncordon")
            self.move(node, "soak-required")
            yield
        yield from self.do(node, *STEPS["soak-required"].does)
        self.move(node, "upgrade-done")
        yield

    def back(self, node: Node) -> Iterator[None]:
        assert node.note
        *proof, opened = STEPS["rollback-required"].does
        if node.note["touched"]:
            yield from self.do(node, "node_gate/drain")
        try:
            if node.note["touched"]:
                yield from self.do(node, *proof)
            if not node.note["drained_before"]:
                yield from self.do(node, opened)
            self.move(node, "rollback-done")
        except TaskError:
            self.move(node, "rollback-failed")
            SEEN["quarantined"] += 1
        yield

    def move(self, node: Node, to: str, **more: Any) -> None:
        assert node.note
        node.note = kept(advance(node.note, to, self.run, self.who, **more))
        SEEN["moves"] += 1

    def do(self, node: Node, *verbs: str) -> Iterator[None]:
        assert node.note
        for verb in verbs:
            if verb not in LOOKS:
                refuse_lost(node.note, self.run, self.who)
            self.fleet.do(node, verb)
            SEEN["verbs"] += 1
            yield


class Fleet(RuleBasedStateMachine):
    """Three nodes, one gateway, whoever comes to change them."""

    @initialize(
        faults=st.lists(
            st.frozensets(
                st.sampled_from(FAULTS),
                max_size=2,
            ),
            min_size=3,
            max_size=3,
        ),
        foreign=st.sampled_from([None, None, *NAMES]),
    )
    def start(self, faults: list[frozenset[str]], foreign: str | None) -> None:
        self.nodes = [Node(name, bad, name == foreign) for name, bad in zip(NAMES, faults, strict=True)]
        for node in self.nodes:
            node.open = not node.foreign
        self.claim: dict[str, Any] | None = None
        self.clock = Clock("boot-1", 100.0)
        self.operators: list[Operator] = []
        self.numbers = itertools.count(1)
        SEEN["histories"] += 1

    # --- what happens ---

    @rule(take_over=st.booleans())
    def somebody_comes(self, take_over: bool) -> None:
        # Whoever was thought to be gone may wake, and go on where he was.
        SEEN["taken_over"] += take_over and any(operator.going for operator in self.operators)
        self.operators.append(Operator(self, next(self.numbers), take_over))

    @rule(which=st.integers(0, 3), steps=st.integers(1, 25))
    def it_goes_on(self, which: int, steps: int) -> None:
        going = [operator for operator in self.operators if operator.going]
        if going:
            operator = going[which % len(going)]
            for _ in range(steps):
                if operator.going:
                    operator.step()
                    self.see()

    @rule(mine=st.integers(1, 40), theirs=st.integers(1, 20), after=st.integers(1, 20))
    def taken_over_and_woken(self, mine: int, theirs: int, after: int) -> None:
        """One works, is thought to be gone, and wakes while whoever took over is at it."""
        self.killed()
        pair = [Operator(self, next(self.numbers), True), Operator(self, next(self.numbers), True)]
        self.operators += pair
        for which, steps in ((0, mine), (1, theirs), (0, after), (1, theirs), (0, after)):
            for _ in range(steps):
                if pair[which].going:
                    pair[which].step()
                    self.see()

    @rule()
    def killed(self) -> None:
        for operator in self.operators:
            SEEN["killed"] += operator.going
            operator.going = False

    @rule(which=st.integers(0, 3))
    def cut_off(self, which: int) -> None:
        """The network between one operator and the fleet is gone for good: ansible gives up."""
        going = [operator for operator in self.operators if operator.going]
        if going:
            going[which % len(going)].going = False
            SEEN["cut_off"] += 1

    @rule(node=st.integers(0, 2))
    def power_lost(self, node: int) -> None:
        """It boots with what is installed; its units are enabled. Whoever was at it loses it."""
        one = self.nodes[node]
        one.loaded, one.engines = one.has["version"], True
        self.killed()
        SEEN["power_lost"] += 1

    @rule()
    def long_silence(self) -> None:
        """Longer than a claim is believed: a laptop that was closed, and wakes some day."""
        self.clock = Clock(self.clock.boot, self.clock.seconds + LEASE_SECONDS)

    @rule()
    def gateway_restarted(self) -> None:
        """Claim and drained servers are files; the clock begins anew."""
        self.clock = Clock(f"boot-{self.clock.boot}", 1.0)
        SEEN["gateway_restarted"] += 1

    # --- what is done to a node ---

    def do(self, node: Node, verb: str) -> None:
        version = node.has["version"]
        fails = f"old {verb}" if version == OLD["version"] else verb
        broken = fails in node.faults
        if verb == "node_gate/drain":
            if node.open and not any(other.open for other in self.nodes if other is not node):
                raise TaskError  # GATE-LAST
            node.open = False
        elif verb == "vllm_server/record":
            assert node.loaded == OLD["version"], "the answers that all is held against are not the old driver's"
        elif verb == "vllm_server/stop":
            assert not node.open, "an engine was stopped under its users"
            node.engines = False
        elif verb == "nvidia_driver/unload":
            assert not node.engines, "a driver was taken from under an engine"
            node.loaded, node.proven = None, False
        elif verb == "nvidia_driver/install":
            assert node.loaded is None, "packages were exchanged under a loaded driver"
            assert node.note
            wanted = node.note["previous"] if node.note["state"] == "rollback-required" else node.note["target"]
            if f"{'old ' if wanted == OLD else ''}{verb}" in node.faults:
                raise TaskError
            if node.has != wanted:
                node.exchanges[wanted["version"]] += 1
            node.has = wanted
        elif verb == "nvidia_driver/load":
            node.loaded = version
        elif verb == "vllm_server/start":
            assert node.loaded, "an engine was started without a driver"
            node.engines = True
        elif verb == "vllm_server/compare" and not broken:
            node.proven = True
        elif verb == "node_gate/uncordon":
            assert node.loaded == node.has["version"] and node.engines, "a node was opened that cannot serve"
            assert node.proven, "a node was opened that had not proven itself"
            node.open = True
        if broken and verb != "nvidia_driver/install":
            raise TaskError

    def alive(self, who: dict[str, Any]) -> bool:
        return any(operator.going and operator.who == who for operator in self.operators)

    # --- what always holds ---

    @invariant()
    def see(self) -> None:
        assert any(node.open for node in self.nodes), "no node was left that serves"
        for node in self.nodes:
            assert not node.open or node.engines, "an open node had no engines"
            assert not (node.foreign and node.open), "a foreign drain was undone"
            if node.note is None:
                continue
            if node.note["state"] == "upgrade-done":
                assert node.has == NEW
            elif node.note["state"] in ("rollback-done", "rollback-failed"):
                assert node.note["previous"] == OLD, "where a node came from was forgotten"
            if node.note["state"] == "rollback-done":
                assert node.has == OLD
            assert node.note["state"] != "rollback-failed" or not node.open, "a node in quarantine was open"

    def teardown(self) -> None:
        """Whatever happened: let alone, the same command brings every node to rest or leaves it untouched."""
        self.killed()
        for _ in range(2 * len(self.nodes)):
            self.operators = [Operator(self, next(self.numbers), True)]
            while self.operators[0].going:
                self.operators[0].step()
                self.see()
        for node in self.nodes:
            assert node.note is None or node.note["state"] in (*AT_REST, "upgrade-required", "rollback-required")
            quarantined = node.note is not None and node.note["state"] == "rollback-failed"
            assert node.open or node.foreign or quarantined, "a node was left closed"


def kept(note: dict[str, Any] | None) -> dict[str, Any]:
    """As it comes back from the disk."""
    return json.loads(json.dumps(note))


TestHistories = Fleet.TestCase
TestHistories.settings = settings(
    max_examples=HISTORIES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_histories_had_it_all_in_them() -> None:
    """Behind the machine, in the order of this file."""
    print("\n" + " ".join(f"{name}={SEEN[name]}" for name in sorted(SEEN)), "violations=0")
    for name in (
        "histories",
        "killed",
        "cut_off",
        "power_lost",
        "gateway_restarted",
        "quarantined",
        "taken_over",
        "fenced",
    ):
        assert SEEN[name], name
