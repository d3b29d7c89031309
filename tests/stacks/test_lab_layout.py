"""Layout and providers of the lab without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pulumi
import pytest
from pulumi.runtime import mocks

from gpuyard.handover import read_handover
from gpuyard.lab.models import LabRef, NodeSpec
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import load_fleet
from stacks.layouts.lab import LabFleet, NetworkProvider, NodeProvider, handover_of, specs_of
from tests.engine import REPOSITORY
from tests.stacks import helpers

HELPERS = "tests.stacks.helpers"
FLEET = load_fleet(REPOSITORY / "fleets/lab.yaml")
CHAT = NodeSpec(name="lab-chat-0", role="gpu", pool="chat", gpu="H100-SXM5-80GB", gpu_count=8)


@pytest.fixture
def lab(tmp_path: Path) -> LabRef:
    return LabRef(project=tmp_path, stack="lab")


def inputs(lab: LabRef, **others: Any) -> dict[str, Any]:
    return {"project": str(lab.project), "stack": lab.stack, **others}


def node(lab: LabRef, **others: Any) -> dict[str, Any]:
    return inputs(lab, **{**CHAT.model_dump(mode="json"), **others})


def test_gateways_come_first_and_names_are_counted_from_zero():
    names = [spec.name for pool in specs_of(FLEET).values() for spec in pool]
    assert names == ["lab-gateway-0", "lab-chat-0", "lab-chat-1"]


def test_a_living_node_as_recorded_is_no_change(lab: LabRef):
    provider = NodeProvider(HELPERS)
    made = provider.create(node(lab))
    assert made.id == "lab-chat-0"
    assert made.outs == {**node(lab), "address": "10.77.0.20", "running": True}
    assert provider.diff(made.id, made.outs, node(lab)).changes is False


def test_a_node_with_another_address_than_recorded_is_a_change(lab: LabRef):
    provider = NodeProvider(HELPERS)
    made = provider.create(node(lab))
    assert provider.diff(made.id, {**(made.outs or {}), "address": "10.77.0.99"}, node(lab)).changes is True


@pytest.mark.parametrize("other", [{"gpu": "L40S"}, {"gpu_count": 4}, {"pool": "code"}, {"project": "/elsewhere"}])
def test_what_makes_a_node_another_one_replaces_it_and_the_old_one_goes_first(lab: LabRef, other: dict[str, Any]):
    provider = NodeProvider(HELPERS)
    made = provider.create(node(lab))
    diff = provider.diff(made.id, made.outs or {}, node(lab, **other))
    assert (diff.replaces, diff.delete_before_replace) == (list(other), True)


def test_a_wiped_node_reads_as_gone(lab: LabRef):
    provider = NodeProvider(HELPERS)
    made = provider.create(node(lab))
    helpers.node_down(lab, "lab-chat-0")
    assert provider.read(made.id, made.outs or {}).id == ""


def test_another_gateway_port_changes_the_network_and_does_not_replace_it(lab: LabRef):
    provider = NetworkProvider(HELPERS)
    made = provider.create(inputs(lab, port=8080))
    diff = provider.diff(made.id, made.outs or {}, inputs(lab, port=8081))
    assert diff.changes is True
    assert not diff.replaces
    updated = provider.update(made.id, made.outs or {}, inputs(lab, port=8081))
    assert (updated.outs or {})["forward"] == {"host_port": 8081, "node_port": 8081}


def test_a_network_with_other_keys_than_recorded_is_a_change(lab: LabRef):
    provider = NetworkProvider(HELPERS)
    made = provider.create(inputs(lab, port=8080))
    outs = made.outs or {}
    assert provider.diff(made.id, outs, inputs(lab, port=8080)).changes is False
    mirrors = {**outs["mirrors"], "nvidia": {**outs["mirrors"]["nvidia"], "fingerprint": "B" * 40}}
    assert provider.diff(made.id, {**outs, "mirrors": mirrors}, inputs(lab, port=8080)).changes is True


def test_a_refusal_keeps_its_line(lab: LabRef, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.tracebacklimit", 1000, raising=False)
    with helpers.world(lab.project) as found:
        found["busy_port"] = 8080
    with pytest.raises(RuntimeError, match=r"^LAB-PORT: port 8080 is in use") as refused:
        NetworkProvider(HELPERS).create(inputs(lab, port=8080))
    assert refused.value.__suppress_context__


class Engine(mocks.Mocks):
    """Makes what it is asked for, by the providers of the pretended lab."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str, dict[str, Any]]:
        self.made.append(f"{args.typ.rsplit(':', 1)[1]} {args.name}")
        asked = {key: value for key, value in args.inputs.items() if key != "__provider"}
        provider = {"LabNetwork": NetworkProvider, "LabNode": NodeProvider}.get(args.typ.rsplit(":", 1)[1])
        if provider is None:
            return args.name, asked
        made = provider(HELPERS).create(asked)
        return made.id, made.outs or {}

    def call(self, args: mocks.MockCallArgs) -> dict[str, Any]:
        raise AssertionError(f"nothing is looked up, {args.token} was")


@pytest.fixture
def event_loop() -> Iterator[None]:
    """Pulumi's mocks expect that there is one."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("event_loop")
def test_the_layout_draws_the_fleet_and_hands_it_over(lab: LabRef):
    engine = Engine()
    mocks.set_mocks(engine, project="gpuyard", stack="lab", preview=False)
    told: list[Any] = []

    @pulumi.runtime.test
    def draw() -> pulumi.Output[None]:
        return LabFleet(FLEET, project=lab.project, stack="lab", agent=HELPERS).handover.apply(told.append)

    draw()
    assert sorted(engine.made) == [
        "Fleet lab",
        "LabNetwork lab-network",
        "LabNode lab-chat-0",
        "LabNode lab-chat-1",
        "LabNode lab-gateway-0",
        "Pool lab-chat",
        "Pool lab-gateway",
    ]
    handover = read_handover(told[0])
    assert {node.name: node.role for node in handover.nodes}["lab-gateway-0"] == "gateway"


def test_a_handover_that_would_be_refused_is_not_exported(lab: LabRef):
    network = helpers.network_up(lab, 8080).model_dump(mode="json")
    told = [network["ssh"], network["mirrors"], network["forward"], {"lab-chat-0": "not an address"}]
    with pytest.raises((ValueError, RefusedError), match="address"):
        handover_of(FLEET, "lab", [CHAT], *told)
