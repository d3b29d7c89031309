"""What the emulated AWS can be asked for: a row for each look-up of the SDK. Nothing is answered that has no row."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from tests.emulated_aws.account import ACCOUNT, Account, EmulatedError
from tests.emulated_aws.kinds import Props, alive

Look = tuple[frozenset[str], Callable[[Account, Props], Props]]
"""The arguments that it knows, and how it is answered."""

ARNS = {
    "vpc": ("vpcs", "VpcId"),
    "subnet": ("subnets", "SubnetId"),
    "security-group": ("security_groups", "GroupId"),
    "internet-gateway": ("internet_gateways", "InternetGatewayId"),
    "route-table": ("route_tables", "RouteTableId"),
    "vpc-endpoint": ("vpc_endpoints", "VpcEndpointId"),
    "elastic-ip": ("addresses", "AllocationId"),
    "launch-template": ("launch_templates", "LaunchTemplateId"),
    "key-pair": ("key_pairs", "KeyPairId"),
    "natgateway": ("nat_gateways", "NatGatewayId"),
    "instance": ("instances", "InstanceId"),
}


def tagged(account: Account, gone: bool = True) -> dict[str, dict[str, str]]:
    """Tags of everything that carries some, by ARN. `gone`: as AWS does, also of what is gone since a while."""
    ec2, elb = account.client("ec2"), account.client("elbv2")
    found: list[tuple[str, list[Props]]] = []
    for kind, (call, key) in ARNS.items():
        told = ec2.get_paginator(f"describe_{call}").paginate() if ec2.can_paginate(f"describe_{call}") else None
        pages = told or [getattr(ec2, f"describe_{call}")()]
        rows = [row for page in pages for row in next(value for value in page.values() if isinstance(value, list))]
        rows = [one for row in rows for one in row["Instances"]] if kind == "instance" else rows
        rows = [row for row in rows if gone or alive(row)]
        found += [(f"arn:aws:ec2:{account.region}:{ACCOUNT}:{kind}/{row[key]}", row.get("Tags", [])) for row in rows]
    arns = [each["LoadBalancerArn"] for each in elb.describe_load_balancers()["LoadBalancers"]]
    for arn in list(arns):
        arns += [each["ListenerArn"] for each in elb.describe_listeners(LoadBalancerArn=arn)["Listeners"]]
    arns += [each["TargetGroupArn"] for each in elb.describe_target_groups()["TargetGroups"]]
    for arn in arns:
        found.append((arn, elb.describe_tags(ResourceArns=[arn])["TagDescriptions"][0]["Tags"]))
    files = account.client("fsx").describe_file_systems()["FileSystems"]
    found += [(each["ResourceARN"], each.get("Tags", [])) for each in files]
    files = account.client("efs").describe_file_systems()["FileSystems"]
    found += [(each["FileSystemArn"], each.get("Tags", [])) for each in files]
    arn = f"arn:aws:ec2:{account.region}:{ACCOUNT}:placement-group"
    mine = {f"{arn}/{name}": props.get("tags", {}) for name, props in account.beside("placement").items()}
    return {**{name: {tag["Key"]: tag["Value"] for tag in tags} for name, tags in found if tags}, **mine}


def resources(account: Account, args: Props) -> Props:
    asked = {row["key"]: row.get("values", []) for row in args["tagFilters"]}
    rows = [
        {"resourceArn": arn, "tags": tags}
        for arn, tags in tagged(account).items()
        if all(tags.get(key) in values for key, values in asked.items())
    ]
    return {"id": account.region, "region": account.region, "resourceTagMappingLists": rows}


def by_tag(tags: Props) -> list[Props]:
    return [{"Name": f"tag:{key}", "Values": [value]} for key, value in tags.items()]


def filters(args: Props) -> list[Props]:
    return [{"Name": row["name"], "Values": row["values"]} for row in args.get("filters", [])]


def instances(account: Account, args: Props) -> Props:
    asked = [*by_tag(args["instanceTags"]), {"Name": "instance-state-name", "Values": args["instanceStateNames"]}]
    pages = account.client("ec2").describe_instances(Filters=asked)["Reservations"]
    return {"id": account.region, "ids": [one["InstanceId"] for page in pages for one in page["Instances"]]}


def nat_gateways(account: Account, args: Props) -> Props:
    rows = account.client("ec2").describe_nat_gateways(Filter=filters(args))["NatGateways"]
    # moto lets every one through where it is asked by tags.
    its = [row for row in rows if args["tags"].items() <= {tag["Key"]: tag["Value"] for tag in row["Tags"]}.items()]
    return {"id": account.region, "ids": [row["NatGatewayId"] for row in its]}


def role(account: Account, args: Props) -> Props:
    found = account.client("iam").get_role(RoleName=args["name"])["Role"]
    return {"id": found["RoleName"], "name": found["RoleName"], "arn": found["Arn"]}


def profile(account: Account, args: Props) -> Props:
    found = account.client("iam").get_instance_profile(InstanceProfileName=args["name"])["InstanceProfile"]
    return {"id": args["name"], "name": args["name"], "arn": found["Arn"]}


def budget(account: Account, args: Props) -> Props:
    account.client("budgets").describe_budget(AccountId=ACCOUNT, BudgetName=args["name"])
    return {"id": f"{ACCOUNT}:{args['name']}", "accountId": ACCOUNT, "name": args["name"]}


def bucket(account: Account, args: Props) -> Props:
    if args["bucket"] not in [each["Name"] for each in account.client("s3").list_buckets()["Buckets"]]:
        raise EmulatedError(f"couldn't find S3 Bucket {args['bucket']}")
    return {"id": args["bucket"], "bucket": args["bucket"]}


def route_table(account: Account, args: Props) -> Props:
    bound = [{"Name": "association.subnet-id", "Values": [args["subnetId"]]}]
    rows = account.client("ec2").describe_route_tables(Filters=bound)["RouteTables"]
    if not rows:
        raise EmulatedError("query returned no results. Please change your search criteria and try again")
    return {"id": rows[0]["RouteTableId"], "routeTableId": rows[0]["RouteTableId"], "subnetId": args["subnetId"]}


def descriptions(account: Account) -> dict[str, tuple[str, str]]:
    """Subnet and description of the interfaces of mount targets, as EFS writes it."""
    efs, found = account.client("efs"), dict[str, tuple[str, str]]()
    for files in efs.describe_file_systems()["FileSystems"]:
        for row in efs.describe_mount_targets(FileSystemId=files["FileSystemId"])["MountTargets"]:
            said = f"EFS mount target for {row['FileSystemId']} ({row['MountTargetId']})"
            found[row["NetworkInterfaceId"]] = (row["SubnetId"], said)
    return found


def interfaces(account: Account, args: Props) -> Props:
    asked = {row["name"]: row["values"][0] for row in args["filters"]}
    assert set(asked) == {"subnet-id", "description"}, "the emulated AWS knows no other filter of interfaces"
    rows = descriptions(account).items()
    fits = [
        card
        for card, (subnet, said) in rows
        if subnet == asked["subnet-id"] and fnmatch.fnmatch(said, asked["description"])
    ]
    return {"id": account.region, "ids": fits}


def interface(account: Account, args: Props) -> Props:
    return {"id": args["id"], "description": descriptions(account)[args["id"]][1]}


def identity(account: Account, args: Props) -> Props:
    account.fault("ask", "getCallerIdentity", {})
    return {"id": ACCOUNT, "accountId": ACCOUNT, "arn": f"arn:aws:iam::{ACCOUNT}:user/emulated", "userId": "emulated"}


def quota(account: Account, args: Props) -> Props:
    """moto has those of a VPC alone: the others are kept beside it, and are as large as a test does not say."""
    account.fault("ask", "getServiceQuota", {})
    value = account.beside("quotas").get(args["quotaCode"], 10_000)
    return {"id": args["quotaCode"], "value": value, "quotaCode": args["quotaCode"]}


def subnet(account: Account, args: Props) -> Props:
    row = account.client("ec2").describe_subnets(SubnetIds=[args["id"]])["Subnets"][0]
    told = {"availabilityZone": row["AvailabilityZone"], "vpcId": row["VpcId"]}
    return {"id": args["id"], **told, "availableIpAddressCount": row["AvailableIpAddressCount"]}


def vpc_endpoint(account: Account, args: Props) -> Props:
    asked = {"vpc-id": args.get("vpcId"), "service-name": args.get("serviceName"), "vpc-endpoint-id": args.get("id")}
    asked["vpc-endpoint-state"] = args["state"]
    given = [{"Name": key, "Values": [value]} for key, value in asked.items() if value]
    rows = account.client("ec2").describe_vpc_endpoints(Filters=given)["VpcEndpoints"]
    if len(rows) != 1:
        raise EmulatedError(f"{'multiple' if rows else 'no'} matching EC2 VPC Endpoint found")
    told = {"vpcId": "VpcId", "serviceName": "ServiceName", "vpcEndpointType": "VpcEndpointType"}
    tables = rows[0].get("RouteTableIds", [])
    found = {key: rows[0][name] for key, name in told.items()}
    return {"id": rows[0]["VpcEndpointId"], **found, "routeTableIds": tables, "state": rows[0]["State"]}


def image(account: Account, args: Props) -> Props:
    """moto has images of its own: those that the fleets name are there unless a test takes them away."""
    (name,) = filters(args)[0]["Values"]
    told = {"architecture": "x86_64", "rootDeviceName": "/dev/sda1", **account.beside("images").get(name, {})}
    if told.get("region", account.region) != account.region:
        raise EmulatedError("Your query returned no results. Please change your search criteria and try again.")
    return {"id": name, "imageId": name, **told}


def offerings(account: Account, args: Props) -> Props:
    asked = {"LocationType": args["locationType"], "Filters": filters(args)}
    rows = account.client("ec2").describe_instance_type_offerings(**asked)["InstanceTypeOfferings"]
    return {
        "id": account.region,
        "instanceTypes": [row["InstanceType"] for row in rows],
        "locations": [row["Location"] for row in rows],
        "locationTypes": [row["LocationType"] for row in rows],
    }


def instance_type(account: Account, args: Props) -> Props:
    row = account.client("ec2").describe_instance_types(InstanceTypes=[args["instanceType"]])["InstanceTypes"][0]
    told = {"defaultVcpus": row["VCpuInfo"]["DefaultVCpus"]}
    return {
        **told,
        "id": args["instanceType"],
        "supportedArchitectures": row["ProcessorInfo"]["SupportedArchitectures"],
    }


LOOKS: dict[str, Look] = {
    "aws:index/getCallerIdentity:getCallerIdentity": (frozenset(), identity),
    "aws:servicequotas/getServiceQuota:getServiceQuota": (frozenset({"serviceCode", "quotaCode"}), quota),
    "aws:ec2/getVpcEndpoint:getVpcEndpoint": (frozenset({"id", "vpcId", "serviceName", "state"}), vpc_endpoint),
    "aws:ec2/getSubnet:getSubnet": (frozenset({"id"}), subnet),
    "aws:ec2/getAmi:getAmi": (frozenset({"filters", "includeDeprecated"}), image),
    "aws:ec2/getInstanceTypeOfferings:getInstanceTypeOfferings": (frozenset({"filters", "locationType"}), offerings),
    "aws:ec2/getInstanceType:getInstanceType": (frozenset({"instanceType"}), instance_type),
    "aws:resourcegroupstaggingapi/getResources:getResources": (frozenset({"tagFilters"}), resources),
    "aws:ec2/getInstances:getInstances": (frozenset({"instanceTags", "instanceStateNames"}), instances),
    "aws:ec2/getNatGateways:getNatGateways": (frozenset({"tags", "filters"}), nat_gateways),
    "aws:ec2/getRouteTable:getRouteTable": (frozenset({"subnetId"}), route_table),
    "aws:ec2/getNetworkInterfaces:getNetworkInterfaces": (frozenset({"filters"}), interfaces),
    "aws:ec2/getNetworkInterface:getNetworkInterface": (frozenset({"id"}), interface),
    "aws:iam/getRole:getRole": (frozenset({"name"}), role),
    "aws:iam/getInstanceProfile:getInstanceProfile": (frozenset({"name"}), profile),
    "aws:budgets/getBudget:getBudget": (frozenset({"name"}), budget),
    "aws:s3/getBucket:getBucket": (frozenset({"bucket"}), bucket),
}
