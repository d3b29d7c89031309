"""The lab: nodes of a fleet as full systemd machines on this very computer.

Providers ask the lab what is there each time they compare, so that a node or a network killed by hand is seen by a
plain `pulumi preview` and mended by a plain `pulumi up`. What they remember in the state is what they were asked for
and what the handover tells; everything else is the lab's own affair.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Protocol, cast

import pulumi
from pulumi import dynamic

from gpuyard.handover import Handover
from gpuyard.lab.errors import LabError
from gpuyard.lab.models import LabRef, NetworkState, NodeSpec, NodeState
from gpuyard.spec.closed import digest_of
from gpuyard.spec.fleet import Fleet

Props = dict[str, Any]  # no `type`: the SDK reads the annotations of outputs, and does not look behind an alias

AGENT = "gpuyard.lab.agent"


class Agent(Protocol):
    """Who makes networks and nodes: the part of `gpuyard.lab.agent` that is used here."""

    def network_up(self, lab: LabRef, port: int) -> NetworkState: ...
    def network_read(self, lab: LabRef) -> NetworkState | None: ...
    def network_down(self, lab: LabRef) -> None: ...
    def node_up(self, lab: LabRef, spec: NodeSpec) -> NodeState: ...
    def node_read(self, lab: LabRef, name: str) -> NodeState | None: ...
    def node_down(self, lab: LabRef, name: str) -> None: ...


def refusals_in_one_line[**P, R](
    act: Callable[Concatenate[LabProvider, P], R],
) -> Callable[Concatenate[LabProvider, P], R]:
    """The SDK shows an error of a provider as its traceback. A refusal is an answer, so it goes without the frames."""

    @functools.wraps(act)
    def acting(self: LabProvider, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(self, *args, **kwargs)
        except LabError as refused:
            sys.tracebacklimit = 0
            raise RuntimeError(str(refused)) from None

    return acting


class LabProvider(dynamic.ResourceProvider):
    """What networks and nodes have in common. The state holds it by its import path, never as source."""

    # Nothing secret is in it, and a secret would be encrypted anew, hence look changed, at every run.
    serialize_as_secret_always = False
    identity: tuple[str, ...] = ()
    """Inputs that cannot change without another thing taking the place of the old one."""

    def __init__(self, agent: str = AGENT) -> None:
        super().__init__()
        self.agent_module = agent

    @property
    def agent(self) -> Agent:
        return cast(Agent, importlib.import_module(self.agent_module))

    def up(self, wanted: Props) -> Props:
        """Make it, or mend it; what is known of it afterwards."""
        raise NotImplementedError

    def found(self, props: Props) -> Props | None:
        """What is known of it now, None if it is not there."""
        raise NotImplementedError

    def complaint(self, recorded: Props, found: Props) -> str | None:
        """Why what is there is not good enough, None if it is."""
        raise NotImplementedError

    def resource_id(self, props: Props) -> str:
        raise NotImplementedError

    @refusals_in_one_line
    def create(self, props: Props) -> dynamic.CreateResult:
        return dynamic.CreateResult(self.resource_id(props), {**_asked(props), **self.up(props)})

    @refusals_in_one_line
    def update(self, _id: str, _olds: Props, _news: Props) -> dynamic.UpdateResult:
        return dynamic.UpdateResult({**_asked(_news), **self.up(_news)})

    @refusals_in_one_line
    def read(self, id_: str, props: Props) -> dynamic.ReadResult:
        found = self.found(props)
        return dynamic.ReadResult("", {}) if found is None else dynamic.ReadResult(id_, {**_asked(props), **found})

    @refusals_in_one_line
    def diff(self, _id: str, _olds: Props, _news: Props) -> dynamic.DiffResult:
        replaces = [key for key in self.identity if _olds.get(key) != _news.get(key)]
        if replaces:
            # One address, one name, one port: the old one has to be gone first.
            return dynamic.DiffResult(changes=True, replaces=replaces, delete_before_replace=True)
        found = self.found(_news)
        why = f"{_id} is gone" if found is None else self.complaint(_olds, found)
        if why:
            print(f"{why}; it will be mended", flush=True)
        asked_anew = any(_olds.get(key) != value for key, value in _asked(_news).items() if value is not None)
        return dynamic.DiffResult(changes=bool(why) or asked_anew)


class NetworkProvider(LabProvider):
    """The lab's network: bridge, way out, forwarded port, keys and artefact server."""

    identity = ("project", "stack")

    def up(self, wanted: Props) -> Props:
        return _plain(self.agent.network_up(_lab(wanted), int(wanted["port"])))

    def found(self, props: Props) -> Props | None:
        state = self.agent.network_read(_lab(props))
        return None if state is None else _plain(state)

    def complaint(self, recorded: Props, found: Props) -> str | None:
        if not found["healthy"]:
            return "the lab's network is broken"
        changed = [key for key, value in found.items() if key != "healthy" and recorded.get(key) != value]
        return f"the lab's network has another {', '.join(changed)} than recorded" if changed else None

    def resource_id(self, props: Props) -> str:
        return f"{props['stack']}-network"

    @refusals_in_one_line
    def delete(self, _id: str, _props: Props) -> None:
        self.agent.network_down(_lab(_props))


class NodeProvider(LabProvider):
    """One node. Other hardware is another node."""

    identity = ("project", "stack", "name", "role", "pool", "gpu", "gpu_count")

    def up(self, wanted: Props) -> Props:
        return _of_node(self.agent.node_up(_lab(wanted), _spec(wanted)))

    def found(self, props: Props) -> Props | None:
        state = self.agent.node_read(_lab(props), props["name"])
        return None if state is None else _of_node(state)

    def complaint(self, recorded: Props, found: Props) -> str | None:
        if not found["running"]:
            return f"{recorded['name']} is not running"
        if found["address"] != recorded.get("address"):
            return f"{recorded['name']} has address {found['address']}, not {recorded.get('address')} as recorded"
        return None

    def resource_id(self, props: Props) -> str:
        return str(props["name"])

    @refusals_in_one_line
    def delete(self, _id: str, _props: Props) -> None:
        self.agent.node_down(_lab(_props), _props["name"])


class LabNetwork(dynamic.Resource, module="gpuyard", name="LabNetwork"):
    """What all nodes of a lab share."""

    ssh: pulumi.Output[Props]
    mirrors: pulumi.Output[Props]
    forward: pulumi.Output[Props]

    def __init__(self, name: str, lab: LabRef, port: int, agent: str, opts: pulumi.ResourceOptions) -> None:
        known_later = dict.fromkeys(("subnet", "bridge", "healthy", "ssh", "mirrors", "forward"))
        asked = {"project": str(lab.project), "stack": lab.stack, "port": port}
        super().__init__(NetworkProvider(agent), name, {**asked, **known_later}, opts)


class LabNode(dynamic.Resource, module="gpuyard", name="LabNode"):
    """One machine."""

    address: pulumi.Output[str]
    running: pulumi.Output[bool]

    def __init__(self, lab: LabRef, spec: NodeSpec, agent: str, opts: pulumi.ResourceOptions) -> None:
        self.spec = spec
        asked = {"project": str(lab.project), "stack": lab.stack, **spec.model_dump(mode="json")}
        super().__init__(NodeProvider(agent), spec.name, {**asked, "address": None, "running": None}, opts)


class LabPool(pulumi.ComponentResource):
    """Nodes that are all alike."""

    nodes: list[LabNode]

    def __init__(
        self,
        name: str,
        lab: LabRef,
        specs: list[NodeSpec],
        network: LabNetwork,
        agent: str,
        opts: pulumi.ResourceOptions,
    ) -> None:
        super().__init__("gpuyard:lab:Pool", name, None, opts)
        ours = pulumi.ResourceOptions(parent=self, depends_on=[network])
        self.nodes = [LabNode(lab, spec, agent, ours) for spec in specs]
        self.register_outputs({"addresses": {node.spec.name: node.address for node in self.nodes}})


class LabFleet(pulumi.ComponentResource):
    """A whole fleet: one network, its gateways, its pools."""

    handover: pulumi.Output[Props]
    """`gpuyard.handover.Handover` as plain data."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        project: Path,
        stack: str,
        agent: str = AGENT,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("gpuyard:lab:Fleet", fleet.name, None, opts)
        ours = pulumi.ResourceOptions(parent=self)
        lab = LabRef(project=project, stack=stack)
        network = LabNetwork(f"{fleet.name}-network", lab, fleet.gateway.port, agent, ours)
        pools = [
            LabPool(f"{fleet.name}-{pool}", lab, specs, network, agent, ours) for pool, specs in specs_of(fleet).items()
        ]
        nodes = [node for pool in pools for node in pool.nodes]
        addresses = pulumi.Output.all(**{node.spec.name: node.address for node in nodes})
        specs = [node.spec for node in nodes]
        self.handover = pulumi.Output.all(network.ssh, network.mirrors, network.forward, addresses).apply(
            lambda told: handover_of(fleet, stack, specs, *told)
        )
        self.register_outputs({"handover": self.handover})


def specs_of(fleet: Fleet) -> dict[str, list[NodeSpec]]:
    """Every node of the fleet, by pool; gateways come first, for the forwarded port leads to the first of them."""
    gateways = [NodeSpec(name=f"{fleet.name}-gateway-{n}", role="gateway") for n in range(fleet.gateway.nodes)]
    pools = {
        pool.name: [
            NodeSpec(
                name=f"{fleet.name}-{pool.name}-{n}",
                role="gpu",
                pool=pool.name,
                gpu=pool.gpu,
                gpu_count=pool.gpus_per_node,
            )
            for n in range(pool.nodes)
        ]
        for pool in fleet.pools
    }
    return {"gateway": gateways, **pools}


def handover_of(
    fleet: Fleet, stack: str, specs: list[NodeSpec], ssh: Props, mirrors: Props, forward: Props, addresses: Props
) -> Props:
    """What convergence has to know; validated here, so that a wrong one is never exported."""
    nodes = [
        {**spec.model_dump(mode="json"), "address": addresses[spec.name], "port": 22, "simulated": True}
        for spec in specs
    ]
    used = {"provider": fleet.provider, "stack": stack, "port": fleet.gateway.port, "nodes": nodes}
    return Handover.model_validate(
        {
            "version": 1,
            "fleet": fleet.name,
            "provider": fleet.provider,
            "stack": stack,
            "provision_digest": digest_of(used),
            "ssh": ssh,
            "mirrors": mirrors,
            "endpoint": f"http://127.0.0.1:{forward['host_port']:.0f}",
            "nodes": tuple(nodes),
        },
        strict=True,
    ).model_dump(mode="json")


def _lab(props: Props) -> LabRef:
    return LabRef(project=Path(props["project"]), stack=props["stack"])


def _spec(props: Props) -> NodeSpec:
    return NodeSpec.model_validate({key: props[key] for key in NodeSpec.model_fields if props.get(key) is not None})


def _asked(props: Props) -> Props:
    """The inputs among the properties: what was found is asked for again each time."""
    keys = ("project", "stack", "port", *NodeSpec.model_fields)
    return {key: props[key] for key in keys if key in props}


def _plain(state: NetworkState) -> Props:
    return state.model_dump(mode="json")


def _of_node(state: NodeState) -> Props:
    return {"address": state.address, "running": state.running}
