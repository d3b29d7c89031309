"""How each type of resource is made, changed and deleted over moto."""

from __future__ import annotations

import json
from typing import Any

from botocore.exceptions import ClientError

from tests.emulated_aws.account import ACCOUNT, Account, EmulatedError
from tests.emulated_aws.kinds import Props, pascal, specified, tags

# --- network -----------------------------------------------------------------------------------------------------


def vpc(client: Any, props: Props) -> tuple[str, Props]:
    made = client.create_vpc(CidrBlock=props["cidrBlock"], TagSpecifications=specified("vpc", props))["Vpc"]["VpcId"]
    client.modify_vpc_attribute(VpcId=made, EnableDnsHostnames={"Value": props["enableDnsHostnames"]})
    mine = [{"Name": "vpc-id", "Values": [made]}, {"Name": "association.main", "Values": ["true"]}]
    table = client.describe_route_tables(Filters=mine)["RouteTables"][0]["RouteTableId"]
    return made, {"defaultRouteTableId": table}


def internet_gateway(client: Any, props: Props) -> tuple[str, Props]:
    answer = client.create_internet_gateway(TagSpecifications=specified("internet-gateway", props))
    made = answer["InternetGateway"]["InternetGatewayId"]
    client.attach_internet_gateway(InternetGatewayId=made, VpcId=props["vpcId"])
    return made, {}


def no_internet_gateway(client: Any, made_id: str, props: Props) -> None:
    client.detach_internet_gateway(InternetGatewayId=made_id, VpcId=props["vpcId"])
    client.delete_internet_gateway(InternetGatewayId=made_id)


def subnet(client: Any, props: Props) -> tuple[str, Props]:
    asked = {"VpcId": props["vpcId"], "CidrBlock": props["cidrBlock"], "AvailabilityZone": props["availabilityZone"]}
    made = client.create_subnet(**asked, TagSpecifications=specified("subnet", props))["Subnet"]
    return made["SubnetId"], {"arn": made["SubnetArn"]}


def eip(client: Any, props: Props) -> tuple[str, Props]:
    made = client.allocate_address(Domain=props["domain"], TagSpecifications=specified("elastic-ip", props))
    return made["AllocationId"], {"publicIp": made["PublicIp"]}


def nat_gateway(client: Any, props: Props) -> tuple[str, Props]:
    asked = {"AllocationId": props["allocationId"], "SubnetId": props["subnetId"]}
    made = client.create_nat_gateway(**asked, TagSpecifications=specified("natgateway", props))
    return made["NatGateway"]["NatGatewayId"], {}


def route_table(client: Any, props: Props) -> tuple[str, Props]:
    answer = client.create_route_table(VpcId=props["vpcId"], TagSpecifications=specified("route-table", props))
    made = answer["RouteTable"]["RouteTableId"]
    routes(client, made, props)
    return made, {}


def routes(client: Any, made: str, props: Props) -> None:
    for route in props["routes"]:
        to = {pascal({key: 0}).popitem()[0]: value for key, value in route.items() if key != "cidrBlock"}
        client.create_route(RouteTableId=made, DestinationCidrBlock=route["cidrBlock"], **to)


def default_route_table(client: Any, props: Props) -> tuple[str, Props]:
    made = props["defaultRouteTableId"]
    client.create_tags(Resources=[made], Tags=tags(props))
    routes(client, made, props)
    return made, {}


def association(client: Any, props: Props) -> tuple[str, Props]:
    asked = {"SubnetId": props["subnetId"], "RouteTableId": props["routeTableId"]}
    return client.associate_route_table(**asked)["AssociationId"], {}


def vpc_endpoint(client: Any, props: Props) -> tuple[str, Props]:
    names = {
        "vpcId": "VpcId",
        "serviceName": "ServiceName",
        "vpcEndpointType": "VpcEndpointType",
        "policy": "PolicyDocument",
        "routeTableIds": "RouteTableIds",
        "subnetIds": "SubnetIds",
        "securityGroupIds": "SecurityGroupIds",
        "privateDnsEnabled": "PrivateDnsEnabled",
    }
    asked = {names[key]: value for key, value in props.items() if key in names}
    made = client.create_vpc_endpoint(**asked, TagSpecifications=specified("vpc-endpoint", props))
    return made["VpcEndpoint"]["VpcEndpointId"], {}


def permissions(rules: list[Props], own: str) -> list[Props]:
    found: list[Props] = []
    for rule in rules:
        one: Props = {"IpProtocol": rule["protocol"]}
        if rule["protocol"] != "-1":
            one |= {"FromPort": int(rule["fromPort"]), "ToPort": int(rule["toPort"])}
        groups = [*([own] if rule.get("self") else []), *rule.get("securityGroups", [])]
        one["UserIdGroupPairs"] = [{"GroupId": group} for group in groups]
        one["IpRanges"] = [{"CidrIp": cidr} for cidr in rule.get("cidrBlocks", [])]
        found.append(one)
    return found


def security_group(client: Any, props: Props) -> tuple[str, Props]:
    made = client.create_security_group(
        GroupName=props["tags"]["Name"],
        Description=props["description"],
        VpcId=props["vpcId"],
        TagSpecifications=specified("security-group", props),
    )["GroupId"]
    # As the SDK's provider does: what EC2 lets out by itself is taken away.
    everything = [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    client.revoke_security_group_egress(GroupId=made, IpPermissions=everything)
    rules(client, made, props)
    return made, {}


def rules(client: Any, made: str, props: Props) -> None:
    now = client.describe_security_groups(GroupIds=[made])["SecurityGroups"][0]
    for way, key in (("ingress", "IpPermissions"), ("egress", "IpPermissionsEgress")):
        if now[key]:
            getattr(client, f"revoke_security_group_{way}")(GroupId=made, IpPermissions=now[key])
        if asked := permissions(props.get(way, []), made):
            getattr(client, f"authorize_security_group_{way}")(GroupId=made, IpPermissions=asked)


# --- machines ----------------------------------------------------------------------------------------------------


def template_data(props: Props) -> Props:
    data = pascal({key: value for key, value in props.items() if key not in ("name", "tags", "tagSpecifications")})
    for card in data["NetworkInterfaces"]:
        card["Groups"] = card.pop("SecurityGroups")
    data["TagSpecifications"] = [
        {"ResourceType": each["resourceType"], "Tags": tags(each)} for each in props["tagSpecifications"]
    ]
    return data


def placement_group(account: Account, props: Props) -> tuple[str, Props]:
    if props["name"] in account.beside("placement"):
        raise EmulatedError(f"InvalidPlacementGroup.Duplicate: {props['name']}")
    account.keep_beside("placement", props["name"], props)
    return props["name"], {"placementGroupId": f"pg-{props['name']}"}


def launch_template(client: Any, props: Props) -> tuple[str, Props]:
    made = client.create_launch_template(
        LaunchTemplateName=props["name"],
        LaunchTemplateData=template_data(props),
        TagSpecifications=specified("launch-template", props),
    )["LaunchTemplate"]
    return made["LaunchTemplateId"], {"latestVersion": made["LatestVersionNumber"]}


def new_version(client: Any, made_id: str, props: Props) -> Props:
    answer = client.create_launch_template_version(LaunchTemplateId=made_id, LaunchTemplateData=template_data(props))
    return {"latestVersion": answer["LaunchTemplateVersion"]["VersionNumber"]}


def instance(account: Account, props: Props) -> tuple[str, Props]:
    client = account.client("ec2")
    template = {"LaunchTemplateId": props["launchTemplate"]["id"], "Version": props["launchTemplate"]["version"]}
    data = account.template(template["LaunchTemplateId"])
    # moto knows one card and one kind of interface: the template, which it keeps whole, has the others.
    primary = data["NetworkInterfaces"][0]
    made = client.run_instances(
        ImageId=data["ImageId"],
        InstanceType=data["InstanceType"],
        SubnetId=primary["SubnetId"],
        SecurityGroupIds=primary["Groups"],
        LaunchTemplate=template,
        MinCount=1,
        MaxCount=1,
        TagSpecifications=specified("instance", props),
    )["Instances"][0]
    zone = data["Placement"]["AvailabilityZone"]
    return made["InstanceId"], {"privateIp": made["PrivateIpAddress"], "availabilityZone": zone}


def running(account: Account, made_id: str) -> Props | None:
    try:
        found = account.client("ec2").describe_instances(InstanceIds=[made_id])["Reservations"][0]["Instances"][0]
    except ClientError:
        return None
    return None if found["State"]["Name"] in ("terminated", "shutting-down") else {}


def retag_instance(account: Account, made_id: str, news: Props) -> None:
    account.client("ec2").create_tags(Resources=[made_id], Tags=tags(news))


# --- others ------------------------------------------------------------------------------------------------------


def policy_of(doc: str) -> str:
    json.loads(doc)  # AWS refuses what is no JSON, moto keeps it
    return doc


def role(account: Account, props: Props) -> tuple[str, Props]:
    made = account.client("iam").create_role(
        RoleName=props["name"], AssumeRolePolicyDocument=policy_of(props["assumeRolePolicy"]), Tags=tags(props)
    )["Role"]
    return made["RoleName"], {"arn": made["Arn"], "name": made["RoleName"]}


def profile(account: Account, props: Props) -> tuple[str, Props]:
    iam = account.client("iam")
    made = iam.create_instance_profile(InstanceProfileName=props["name"], Tags=tags(props))["InstanceProfile"]
    iam.add_role_to_instance_profile(InstanceProfileName=props["name"], RoleName=props["role"])
    return props["name"], {"arn": made["Arn"]}


def no_profile(account: Account, made_id: str, props: Props) -> None:
    iam = account.client("iam")
    iam.remove_role_from_instance_profile(InstanceProfileName=made_id, RoleName=props["role"])
    iam.delete_instance_profile(InstanceProfileName=made_id)


def attachment(account: Account, props: Props) -> tuple[str, Props]:
    account.client("iam").attach_role_policy(RoleName=props["role"], PolicyArn=props["policyArn"])
    return f"{props['role']}/{props['policyArn']}", {}


def bucket(account: Account, props: Props) -> tuple[str, Props]:
    s3 = account.client("s3")
    s3.create_bucket(Bucket=props["bucket"])
    s3.put_bucket_tagging(Bucket=props["bucket"], Tagging={"TagSet": tags(props)})
    return props["bucket"], {"arn": f"arn:aws:s3:::{props['bucket']}"}


def shut(account: Account, props: Props) -> tuple[str, Props]:
    asked = {key: value for key, value in pascal(props).items() if key != "Bucket"}
    account.client("s3").put_public_access_block(Bucket=props["bucket"], PublicAccessBlockConfiguration=asked)
    return props["bucket"], {}


def bucket_policy(account: Account, props: Props) -> tuple[str, Props]:
    account.client("s3").put_bucket_policy(Bucket=props["bucket"], Policy=policy_of(props["policy"]))
    return props["bucket"], {}


def balancer(account: Account, props: Props) -> tuple[str, Props]:
    made = account.client("elbv2").create_load_balancer(
        Name=props["name"],
        Type=props["loadBalancerType"],
        Scheme="internal" if props["internal"] else "internet-facing",
        Subnets=props["subnets"],
        SecurityGroups=props["securityGroups"],
        Tags=tags(props),
    )["LoadBalancers"][0]
    return made["LoadBalancerArn"], {"arn": made["LoadBalancerArn"], "dnsName": made["DNSName"]}


def target_group(account: Account, props: Props) -> tuple[str, Props]:
    asked = {"Name": props["name"], "Protocol": props["protocol"], "Port": int(props["port"]), "VpcId": props["vpcId"]}
    made = account.client("elbv2").create_target_group(**asked, TargetType="instance", Tags=tags(props))
    arn = made["TargetGroups"][0]["TargetGroupArn"]
    return arn, {"arn": arn}


def listener(account: Account, props: Props) -> tuple[str, Props]:
    action = props["defaultActions"][0]
    made = account.client("elbv2").create_listener(
        LoadBalancerArn=props["loadBalancerArn"],
        Protocol=props["protocol"],
        Port=int(props["port"]),
        DefaultActions=[{"Type": action["type"], "TargetGroupArn": action["targetGroupArn"]}],
        Tags=tags(props),
    )
    arn = made["Listeners"][0]["ListenerArn"]
    return arn, {"arn": arn}


def target(account: Account, props: Props) -> tuple[str, Props]:
    one = {"Id": props["targetId"], "Port": int(props["port"])}
    account.client("elbv2").register_targets(TargetGroupArn=props["targetGroupArn"], Targets=[one])
    return f"{props['targetGroupArn']}|{props['targetId']}", {}


def no_target(account: Account, made_id: str, props: Props) -> None:
    one = {"Id": props["targetId"]}
    account.client("elbv2").deregister_targets(TargetGroupArn=props["targetGroupArn"], Targets=[one])


def lustre(account: Account, props: Props) -> tuple[str, Props]:
    own = {"DeploymentType": props["deploymentType"]}
    own["PerUnitStorageThroughput"] = int(props["perUnitStorageThroughput"])
    made = account.client("fsx").create_file_system(
        FileSystemType="LUSTRE",
        StorageCapacity=int(props["storageCapacity"]),
        StorageType=props["storageType"],
        SubnetIds=[props["subnetIds"]],
        SecurityGroupIds=props["securityGroupIds"],
        LustreConfiguration=own,
        Tags=tags(props),
    )["FileSystem"]
    made_id = made["FileSystemId"]
    return made_id, {"dnsName": f"{made_id}.fsx.{account.region}.amazonaws.com", "mountName": "emulated"}


def efs(account: Account, props: Props) -> tuple[str, Props]:
    made = account.client("efs").create_file_system(
        Encrypted=props["encrypted"], ThroughputMode=props["throughputMode"], Tags=tags(props)
    )["FileSystemId"]
    return made, {"dnsName": f"{made}.efs.{account.region}.amazonaws.com"}


def mount_target(account: Account, props: Props) -> tuple[str, Props]:
    asked = {"FileSystemId": props["fileSystemId"], "SubnetId": props["subnetId"]}
    made = account.client("efs").create_mount_target(**asked, SecurityGroups=props["securityGroups"])
    return made["MountTargetId"], {}


def budget(account: Account, props: Props) -> tuple[str, Props]:
    asked = {
        "BudgetName": props["name"],
        "BudgetType": props["budgetType"],
        "TimeUnit": props["timeUnit"],
        "BudgetLimit": {"Amount": props["limitAmount"], "Unit": props["limitUnit"]},
        "CostFilters": {each["name"]: each["values"] for each in props["costFilters"]},
    }
    account.client("budgets").create_budget(AccountId=ACCOUNT, Budget=asked)
    return props["name"], {}


def no_budget(account: Account, made_id: str, props: Props) -> None:
    account.client("budgets").delete_budget(AccountId=ACCOUNT, BudgetName=made_id)
