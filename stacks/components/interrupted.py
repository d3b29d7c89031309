"""Looks in the account for what a killed `up` had begun to make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import pulumi
import pulumi_aws as aws

from gpuyard.provision.interrupted import Begun, by_tags, the_one
from stacks.components.account import or_none

_ALIVE = ["pending", "running", "stopping", "stopped"]


class Finder:
    """Asks with the SDK's own look-ups, hence with the credentials and in the region of the fleet."""

    def __init__(self, fleet: str, provider: aws.Provider) -> None:
        self.fleet = fleet
        self.opts = pulumi.InvokeOptions(provider=provider)

    def ids(self, all_begun: Sequence[Begun]) -> dict[str, str]:
        """What the SDK's import takes for each that is there, by its name in the list."""
        found = {one.item.name: self.id_of(one) for one in all_begun}
        return {name: its for name, its in found.items() if its is not None}

    def id_of(self, one: Begun) -> str | None:
        inputs, opts = one.inputs, self.opts
        mine = {"Name": one.item.inputs.get("tags", {}).get("Name"), "gpuyard:fleet": self.fleet}
        match one.how:
            case "tags":
                return by_tags(one, self.fleet, self._tagged)
            case "instances":
                return the_one(
                    one, aws.ec2.get_instances(instance_state_names=_ALIVE, instance_tags=mine, opts=opts).ids
                )
            case "nat":
                alive = [{"name": "state", "values": ["pending", "available"]}]
                return the_one(one, aws.ec2.get_nat_gateways(filters=alive, tags=mine, opts=opts).ids)
            case "role":
                return or_none(lambda: aws.iam.get_role(inputs["name"], opts=opts).name)
            case "profile":
                return or_none(lambda: aws.iam.get_instance_profile(inputs["name"], opts=opts).name)
            case "budget":
                budget = or_none(lambda: aws.budgets.get_budget(name=inputs["name"], opts=opts))
                return budget and f"{budget.account_id}:{budget.name}"
            case "bucket":
                return or_none(lambda: aws.s3.get_bucket(inputs["bucket"], opts=opts).bucket)
            case "association":
                table = or_none(lambda: aws.ec2.get_route_table(subnet_id=inputs["subnetId"], opts=opts))
                its = table and table.route_table_id == inputs["routeTableId"]
                return f"{inputs['subnetId']}/{inputs['routeTableId']}" if its else None
            case "target":
                return the_one(one, self._mount_targets(inputs["fileSystemId"], inputs["subnetId"]))
            case "again":
                return None

    @cached_property
    def _tagged(self) -> list[tuple[str, dict[str, str]]]:
        """ARN and tags of everything that carries the fleet's tag."""
        only = [{"key": "gpuyard:fleet", "values": [self.fleet]}]
        told = aws.resourcegroupstaggingapi.get_resources(tag_filters=only, opts=self.opts)
        return [(row.resource_arn, dict(row.tags)) for row in told.resource_tag_mapping_lists]

    def _mount_targets(self, files: str, subnet: str) -> list[str]:
        """A mount target has no tag; the interface that it stands on is described by its id and its file system's."""
        where = [{"name": "subnet-id", "values": [subnet]}, {"name": "description", "values": [f"*{files}*"]}]
        cards = aws.ec2.get_network_interfaces(filters=where, opts=self.opts).ids
        told = [aws.ec2.get_network_interface(id=card, opts=self.opts).description for card in cards]
        return [found for text in told for found in re.findall(r"fsmt-[0-9a-f]+", text)]
