"""What makes a list of `gpuyard.provision.Wanted` with the official SDK of AWS, and nothing that is not on the list."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pulumi

from gpuyard.provision import Json, Ref, Wanted, resource_name


class AwsPart(pulumi.ComponentResource):
    """What belongs together: the network, the gateways, a pool."""

    def __init__(self, name: str, opts: pulumi.ResourceOptions) -> None:
        super().__init__("gpuyard:aws:Part", name, None, opts)
        self.register_outputs({})


class Maker:
    """Makes the items of a list one by one; each may refer to those before it."""

    def __init__(
        self,
        fleet: str,
        opts: pulumi.ResourceOptions,
        hooks: pulumi.ResourceHookBinding,
        there: Mapping[str, str],
    ) -> None:
        """`there`: ids of what is there and in no state, by the name in the list: it is taken over, not made."""
        self.fleet = fleet
        self.opts = opts
        self.hooks = hooks
        self.there = there
        self.parts: dict[str, AwsPart] = {}
        self.made: dict[str, Any] = {}

    def make(self, items: Sequence[Wanted]) -> dict[str, Any]:
        """Every resource by the name that it has in the list."""
        for item in items:
            if item.part not in self.parts:
                self.parts[item.part] = AwsPart(f"{self.fleet}-{item.part}", self.opts)
            options = pulumi.ResourceOptions(
                parent=self.parts[item.part],
                depends_on=[self.made[name] for name in item.after],
                ignore_changes=list(item.keeps),
                protect=True,
                import_=self.there.get(item.name),
                # A class of the SDK knows its inputs in Python's words, its options those of the engine.
                hooks=self.hooks if item.node and item.kind == "ec2.Instance" else None,
            )
            inputs = {key: self.resolved(value) for key, value in item.inputs.items()}
            self.made[item.name] = class_of(item.kind)(resource_name(item, self.fleet), **inputs, opts=options)
        return self.made

    def resolved(self, value: Any) -> Any:
        """The value with outputs in the place of references."""
        match value:
            case Ref():
                return getattr(self.made[value.name], value.attribute)
            case Json():
                return pulumi.Output.from_input(self.resolved(dict(value.data))).apply(
                    lambda data: json.dumps(data, sort_keys=True)
                )
            case dict():
                return {key: self.resolved(item) for key, item in value.items()}
            case list() | tuple():
                return [self.resolved(item) for item in value]
            case _:
                return value


def class_of(kind: str) -> Callable[..., pulumi.CustomResource]:
    """The SDK's class, from its own submodule: the whole of the SDK takes seconds to import."""
    module, name = kind.split(".")
    return getattr(importlib.import_module(f"pulumi_aws.{module}"), name)
