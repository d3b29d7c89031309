"""What the real engine says of a fleet, read by `gpuyard guard`: nothing found as it is, its rule after a change."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.emulated_aws.conftest import BroughtUp
from tests.emulated_aws.fleet import EmulatedFleet

pytestmark = pytest.mark.engine

Rules = dict[str, str]
"""What was found of which resource, by rule."""


@pytest.fixture
def g6e(brought_up: BroughtUp) -> Iterator[EmulatedFleet]:
    """Eight machines in two zones. Nothing is brought up by these tests, and its files and its state are put back."""
    fleet, _ = brought_up("aws-g6e")
    files = [
        fleet.project / name for name in ("fleets/aws-g6e.yaml", "fleets/aws-g6e.lock.yaml", "stacks/components/aws.py")
    ]
    kept, state = {path: path.read_text() for path in files}, fleet.project / "state.json"
    state.write_text(fleet.done("stack", "export"))
    yield fleet
    for path, text in kept.items():
        path.write_text(text)
    fleet.done("stack", "import", "--file", str(state))


def guarded(fleet: EmulatedFleet, told: str, *words: str) -> tuple[int, Rules]:
    """Exit code and findings of `gpuyard guard` on what the engine said. They are of the whole fleet each time."""
    path = fleet.project / "told.json"
    path.write_text(told)
    ran = subprocess.run(["gpuyard", "guard", str(path), *words, "--json"], capture_output=True, text=True, check=False)
    report = json.loads(ran.stdout)
    assert report["resources"] > 50
    return ran.returncode, {row["rule"]: f"{row['resource']}: {row['found']}" for row in report["findings"]}


def test_a_fleet_as_it_is_passes_as_a_state_and_as_a_preview(g6e: EmulatedFleet):
    spec = ("--fleet", str(g6e.project / "fleets/aws-g6e.yaml"))
    assert guarded(g6e, g6e.done("stack", "export"), *spec) == (0, {})
    assert guarded(g6e, g6e.done("preview", "--json", "--show-sames"), *spec) == (0, {})
    path = g6e.project / "short.json"
    path.write_text(g6e.done("preview", "--json"))
    short = subprocess.run(["gpuyard", "guard", str(path)], capture_output=True, text=True, check=False)
    assert (short.returncode, "resources left out" in short.stderr) == (3, True), short


def test_a_node_that_goes_is_refused_until_it_is_drained_and_one_too_many_costs_more_than_the_plan(g6e: EmulatedFleet):
    reviewed = g6e.project / "reviewed.yaml"
    reviewed.write_text((g6e.project / "fleets/aws-g6e.yaml").read_text())
    g6e.resize("chat", 7)
    g6e.give_up("aws-g6e-chat-7")
    told = g6e.done("preview", "--json", "--show-sames")
    assert guarded(g6e, told) == (1, {"GUARD-NODE": "aws-g6e-chat-7: would be deleted"})
    assert guarded(g6e, told, "--drained", "aws-g6e-chat-7") == (0, {})
    g6e.resize("chat", 9)
    code, found = guarded(g6e, g6e.done("preview", "--json", "--show-sames"), "--fleet", str(reviewed))
    assert (code, list(found)) == (1, ["GUARD-COST"])


def test_a_machine_that_the_engine_would_replace_is_refused_with_the_engine_s_reason(g6e: EmulatedFleet):
    """No setting of the spec does that: it takes a program that no longer keeps machines as they were made."""
    maker = g6e.project / "stacks/components/aws.py"
    loose = maker.read_text().replace("ignore_changes=list(item.keeps),", "")
    assert loose != maker.read_text()
    maker.write_text(loose)
    g6e.edit("purchase: on-demand}\n", "purchase: on-demand}\n    aws: {zones: [us-east-1b, us-east-1a]}\n")
    g6e.give_up(*(f"aws-g6e-chat-{number}" for number in range(8)))
    code, found = guarded(g6e, g6e.done("preview", "--json", "--show-sames"))
    assert code == 1
    assert found["GUARD-NODE"].endswith("would be replaced, because of launchTemplate")
