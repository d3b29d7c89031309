"""What an `up` that was killed had begun to make, and how each of it is found in the account.

The engine writes down that it begins before it asks, and that it is done after the answer. What was killed between the
two may be there or not, and the next `up` would make it a second time: two machines of one name, one of them in no
state. So it is looked for first, and what is found is taken over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpuyard.provision import Wanted, name_in, resource_name
from gpuyard.spec.errors import RefusedError

How = Literal["tags", "instances", "nat", "role", "profile", "budget", "bucket", "association", "target", "again"]

HOW: Mapping[str, How] = {
    # Those that EC2 goes on telling for an hour after they are gone are asked for with their state.
    "ec2.Instance": "instances",
    "ec2.NatGateway": "nat",
    # Those that carry no tag, or get theirs in a second call, or are of a service that is not asked by tags.
    "iam.Role": "role",
    "iam.InstanceProfile": "profile",
    "budgets.Budget": "budget",
    "s3.Bucket": "bucket",
    "ec2.RouteTableAssociation": "association",
    "efs.MountTarget": "target",
    # Those that say how something is: to say it again makes no second one.
    "ec2.DefaultRouteTable": "again",
    "iam.RolePolicyAttachment": "again",
    "lb.TargetGroupAttachment": "again",
    "s3.BucketPolicy": "again",
    "s3.BucketPublicAccessBlock": "again",
}
"""How a kind is found; `tags` for all others."""

# Type in an ARN, and what the SDK's import takes: the end of the ARN, the whole of it, or the name that was asked for.
_ARNS: Mapping[str, tuple[str, Literal["end", "whole", "keyName"]]] = {
    "ec2.Vpc": (":vpc/", "end"),
    "ec2.InternetGateway": (":internet-gateway/", "end"),
    "ec2.Subnet": (":subnet/", "end"),
    "ec2.Eip": (":elastic-ip/", "end"),
    "ec2.RouteTable": (":route-table/", "end"),
    "ec2.SecurityGroup": (":security-group/", "end"),
    "ec2.VpcEndpoint": (":vpc-endpoint/", "end"),
    "ec2.KeyPair": (":key-pair/", "keyName"),
    "ec2.PlacementGroup": (":placement-group/", "end"),
    "ec2.LaunchTemplate": (":launch-template/", "end"),
    "lb.LoadBalancer": (":loadbalancer/", "whole"),
    "lb.TargetGroup": (":targetgroup/", "whole"),
    "lb.Listener": (":listener/", "whole"),
    "fsx.LustreFileSystem": (":fsx:", "end"),
    "efs.FileSystem": (":elasticfilesystem:", "end"),
}


@dataclass(frozen=True, slots=True)
class Begun:
    """One thing whose making was begun, and nobody knows whether it was ended."""

    item: Wanted
    inputs: Mapping[str, Any]
    """What was asked for, by the engine's words."""

    @property
    def how(self) -> How:
        return HOW.get(self.item.kind, "tags")


def begun(items: Sequence[Wanted], fleet: str, deployment: Mapping[str, Any]) -> list[Begun]:
    """What the state says was begun and does not say is there. `deployment`: of `pulumi stack export`."""
    by_name = {resource_name(item, fleet): item for item in items}
    there = {row["urn"] for row in deployment.get("resources") or ()}
    found: dict[str, Begun] = {}
    for operation in deployment.get("pending_operations") or ():
        row = operation["resource"]
        name = name_in(row["urn"])
        # A create that was gone on with stays in the state's list until `pulumi refresh --clear-pending-creates`.
        if operation["type"] == "creating" and row["urn"] not in there and name in by_name:
            found[name] = Begun(by_name[name], row.get("inputs") or {})
    return list(found.values())


def by_tags(one: Begun, fleet: str, tagged: Iterable[tuple[str, Mapping[str, str]]]) -> str | None:
    """The id of the thing among ARNs with their tags. RefusedError where there are two: none is taken for the other."""
    part, which = _ARNS[one.item.kind]
    wanted = one.item.inputs["tags"]["Name"], fleet
    arns = [arn for arn, tags in tagged if part in arn and (tags.get("Name"), tags.get("gpuyard:fleet")) == wanted]
    match which:
        case "whole":
            ids = arns
        case "end":
            ids = [re.split(r"[/:]", arn)[-1] for arn in arns]
        case _:
            ids = [str(one.inputs[which]) for _ in arns]
    return the_one(one, ids)


def the_one(one: Begun, ids: Sequence[str]) -> str | None:
    """None where nothing was found. RefusedError where there are several."""
    if len(ids) > 1:
        have = f"{', '.join(sorted(ids))} are all {one.item.name}"
        why = "an `up` was killed while it made it, and which of them it made is not known"
        raise RefusedError("AWS-TWICE", have, why, "delete all but one of them, then `pulumi up`")
    return ids[0] if ids else None
