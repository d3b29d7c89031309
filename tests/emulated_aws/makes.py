"""How each type of resource is made, changed and deleted over moto."""

from __future__ import annotations

import json
from typing import Any

from tests.emulated_aws.account import ACCOUNT, Account, EmulatedError
from tests.emulated_aws.kinds import Props, pascal, specified, tags

# --- network -----------------------------------------------------------------------------------------------------


def vpc(client: Any, props: Props) -> str:
    made = client.create_vpc(CidrBlock=props["cidrBlock"], TagSpecifications=specified("vpc", props))["Vpc"]["VpcId"]
    dns_hostnames(client, made, props)
    return made


def dns_hostnames(client: Any, made: str, props: Props) -> None:
    client.modify_vpc_attribute(VpcId=made, EnableDnsHostnames={"Value": props["enableDnsHostnames"]})


def default_table(client: Any, made: str, props: Props) -> Props:
    mine = [{"Name": "vpc-id", "Values": [made]}, {"Name": "association.main", "Values": ["true"]}]
    return {"defaultRouteTableId": client.describe_route_tables(Filters=mine)["RouteTables"][0]["RouteTableId"]}


def internet_gateway(client: Any, props: Props) -> str:
    answer = client.create_internet_gateway(TagSpecifications=specified("internet-gateway", props))
    made = answer["InternetGateway"]["InternetGatewayId"]
    attached(client, made, props)
    return made


def attached(client: Any, made: str, props: Props) -> None:
    if not client.describe_internet_gateways(InternetGatewayIds=[made])["InternetGateways"][0]["Attachments"]:
        client.attach_internet_gateway(InternetGatewayId=made, VpcId=props["vpcId"])


def no_internet_gateway(client: Any, made_id: str, props: Props) -> None:
    if client.describe_internet_gateways(InternetGatewayIds=[made_id])["InternetGateways"][0]["Attachments"]:
        client.detach_internet_gateway(InternetGatewayId=made_id, VpcId=props["vpcId"])
    client.delete_internet_gateway(InternetGatewayId=made_id)


def subnet(client: Any, props: Props) -> str:
    asked = {"VpcId": props["vpcId"], "CidrBlock": props["cidrBlock"], "AvailabilityZone": props["availabilityZone"]}
    made = client.create_subnet(**asked, TagSpecifications=specified("subnet", props))["Subnet"]
    return made["SubnetId"]


def eip(client: Any, props: Props) -> str:
    made = client.allocate_address(Domain=props["domain"], TagSpecifications=specified("elastic-ip", props))
    return made["AllocationId"]


def nat_gateway(client: Any, props: Props) -> str:
    asked = {"AllocationId": props["allocationId"], "SubnetId": props["subnetId"]}
    made = client.create_nat_gateway(**asked, TagSpecifications=specified("natgateway", props))
    return made["NatGateway"]["NatGatewayId"]


def route_table(client: Any, props: Props) -> str:
    answer = client.create_route_table(VpcId=props["vpcId"], TagSpecifications=specified("route-table", props))
    made = answer["RouteTable"]["RouteTableId"]
    routes(client, made, props)
    return made


def routes(client: Any, made: str, props: Props) -> None:
    told = client.describe_route_tables(RouteTableIds=[made])["RouteTables"][0]["Routes"]
    there = {route.get("DestinationCidrBlock") for route in told}
    for route in props["routes"]:
        to = {pascal({key: 0}).popitem()[0]: value for key, value in route.items() if key != "cidrBlock"}
        act = client.replace_route if route["cidrBlock"] in there else client.create_route
        act(RouteTableId=made, DestinationCidrBlock=route["cidrBlock"], **to)


def default_route_table(client: Any, props: Props) -> str:
    made = props["defaultRouteTableId"]
    client.create_tags(Resources=[made], Tags=tags(props))
    routes(client, made, props)
    return made


def association(client: Any, props: Props) -> str:
    asked = {"SubnetId": props["subnetId"], "RouteTableId": props["routeTableId"]}
    return client.associate_route_table(**asked)["AssociationId"]


def association_of(account: Account, called: str) -> str:
    """The id of an association; imported, it is called by its subnet and its table."""
    subnet, _, _ = called.partition("/")
    bound = [{"Name": "association.subnet-id", "Values": [subnet]}]
    tables = account.client("ec2").describe_route_tables(Filters=bound)["RouteTables"] if subnet != called else []
    rows = [row for table in tables for row in table["Associations"] if row.get("SubnetId") == subnet]
    return rows[0]["RouteTableAssociationId"] if rows else called


def vpc_endpoint(client: Any, props: Props) -> str:
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
    return made["VpcEndpoint"]["VpcEndpointId"]


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


def security_group(client: Any, props: Props) -> str:
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
    return made


def rules(client: Any, made: str, props: Props) -> None:
    now = client.describe_security_groups(GroupIds=[made])["SecurityGroups"][0]
    for way, key in (("ingress", "IpPermissions"), ("egress", "IpPermissionsEgress")):
        if now[key]:
            getattr(client, f"revoke_security_group_{way}")(GroupId=made, IpPermissions=now[key])
        if asked := permissions(props.get(way, []), made):
            getattr(client, f"authorize_security_group_{way}")(GroupId=made, IpPermissions=asked)


def rules_seen(client: Any, made: str, props: Props) -> Props:
    """What was asked for, and behind it each rule that nobody asked for here."""
    now = client.describe_security_groups(GroupIds=[made])["SecurityGroups"][0]
    found = dict(props)
    for way, key in (("ingress", "IpPermissions"), ("egress", "IpPermissionsEgress")):
        asked = {(rule["IpProtocol"], rule.get("FromPort")) for rule in permissions(props.get(way, []), made)}
        if others := [rule for rule in now[key] if (rule["IpProtocol"], rule.get("FromPort")) not in asked]:
            found[way] = [*props.get(way, []), *map(rule_of, others)]
    return found


def rule_of(permission: Props) -> Props:
    """What `permissions` makes of a rule for addresses, the other way."""
    return {
        "protocol": permission["IpProtocol"],
        "fromPort": permission.get("FromPort", 0),
        "toPort": permission.get("ToPort", 0),
        "cidrBlocks": [each["CidrIp"] for each in permission["IpRanges"]],
    }


# --- machines ----------------------------------------------------------------------------------------------------


def template_data(props: Props) -> Props:
    data = pascal({key: value for key, value in props.items() if key not in ("name", "tags", "tagSpecifications")})
    for card in data["NetworkInterfaces"]:
        card["Groups"] = card.pop("SecurityGroups")
    data["TagSpecifications"] = [
        {"ResourceType": each["resourceType"], "Tags": tags(each)} for each in props["tagSpecifications"]
    ]
    return data


def placement_group(account: Account, props: Props) -> str:
    if props["name"] in account.beside("placement"):
        raise EmulatedError(f"InvalidPlacementGroup.Duplicate: {props['name']}")
    account.keep_beside("placement", props["name"], props)
    return props["name"]


def launch_template(client: Any, props: Props) -> str:
    made = client.create_launch_template(
        LaunchTemplateName=props["name"],
        LaunchTemplateData=template_data(props),
        TagSpecifications=specified("launch-template", props),
    )["LaunchTemplate"]
    return made["LaunchTemplateId"]


def new_version(client: Any, made_id: str, props: Props) -> None:
    client.create_launch_template_version(LaunchTemplateId=made_id, LaunchTemplateData=template_data(props))


def latest(client: Any, made_id: str, props: Props) -> Props:
    found = client.describe_launch_templates(LaunchTemplateIds=[made_id])["LaunchTemplates"][0]
    return {"latestVersion": found["LatestVersionNumber"]}


def instance(account: Account, props: Props) -> str:
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
    return made["InstanceId"]


def found(account: Account, made_id: str) -> Props:
    return account.client("ec2").describe_instances(InstanceIds=[made_id])["Reservations"][0]["Instances"][0]


def address(account: Account, made_id: str, props: Props) -> Props:
    one = found(account, made_id)
    zone = one["Placement"]["AvailabilityZone"]
    return {"privateIp": one["PrivateIpAddress"], "availabilityZone": zone, "instanceType": one["InstanceType"]}


def retag_instance(account: Account, made_id: str, news: Props) -> None:
    account.client("ec2").create_tags(Resources=[made_id], Tags=tags(news))


# --- others ------------------------------------------------------------------------------------------------------


def policy_of(doc: str) -> str:
    json.loads(doc)  # AWS refuses what is no JSON, moto keeps it
    return doc


def role(account: Account, props: Props) -> str:
    made = account.client("iam").create_role(
        RoleName=props["name"], AssumeRolePolicyDocument=policy_of(props["assumeRolePolicy"]), Tags=tags(props)
    )["Role"]
    return made["RoleName"]


def profile(account: Account, props: Props) -> str:
    iam = account.client("iam")
    iam.create_instance_profile(InstanceProfileName=props["name"], Tags=tags(props))
    role_in_profile(account, props["name"], props)
    return props["name"]


def role_in_profile(account: Account, made_id: str, props: Props) -> None:
    iam = account.client("iam")
    if not iam.get_instance_profile(InstanceProfileName=made_id)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=made_id, RoleName=props["role"])


def no_profile(account: Account, made_id: str, props: Props) -> None:
    iam = account.client("iam")
    if iam.get_instance_profile(InstanceProfileName=made_id)["InstanceProfile"]["Roles"]:
        iam.remove_role_from_instance_profile(InstanceProfileName=made_id, RoleName=props["role"])
    iam.delete_instance_profile(InstanceProfileName=made_id)


def attachment(account: Account, props: Props) -> str:
    account.client("iam").attach_role_policy(RoleName=props["role"], PolicyArn=props["policyArn"])
    return f"{props['role']}/{props['policyArn']}"


def bucket(account: Account, props: Props) -> str:
    account.client("s3").create_bucket(Bucket=props["bucket"])
    tagged_bucket(account, props["bucket"], props)
    return props["bucket"]


def tagged_bucket(account: Account, made_id: str, props: Props) -> None:
    account.client("s3").put_bucket_tagging(Bucket=made_id, Tagging={"TagSet": tags(props)})


def shut(account: Account, props: Props) -> str:
    asked = {key: value for key, value in pascal(props).items() if key != "Bucket"}
    account.client("s3").put_public_access_block(Bucket=props["bucket"], PublicAccessBlockConfiguration=asked)
    return props["bucket"]


def bucket_policy(account: Account, props: Props) -> str:
    account.client("s3").put_bucket_policy(Bucket=props["bucket"], Policy=policy_of(props["policy"]))
    return props["bucket"]


def balancer(account: Account, props: Props) -> str:
    made = account.client("elbv2").create_load_balancer(
        Name=props["name"],
        Type=props["loadBalancerType"],
        Scheme="internal" if props["internal"] else "internet-facing",
        Subnets=props["subnets"],
        SecurityGroups=props["securityGroups"],
        Tags=tags(props),
    )["LoadBalancers"][0]
    return made["LoadBalancerArn"]


def balancer_name(account: Account, made_id: str, props: Props) -> Props:
    found = account.client("elbv2").describe_load_balancers(LoadBalancerArns=[made_id])["LoadBalancers"][0]
    return {"arn": made_id, "dnsName": found["DNSName"]}


def target_group(account: Account, props: Props) -> str:
    asked = {"Name": props["name"], "Protocol": props["protocol"], "Port": int(props["port"]), "VpcId": props["vpcId"]}
    made = account.client("elbv2").create_target_group(**asked, TargetType="instance", Tags=tags(props))
    return made["TargetGroups"][0]["TargetGroupArn"]


def listener(account: Account, props: Props) -> str:
    action = props["defaultActions"][0]
    made = account.client("elbv2").create_listener(
        LoadBalancerArn=props["loadBalancerArn"],
        Protocol=props["protocol"],
        Port=int(props["port"]),
        DefaultActions=[{"Type": action["type"], "TargetGroupArn": action["targetGroupArn"]}],
        Tags=tags(props),
    )
    return made["Listeners"][0]["ListenerArn"]


def target(account: Account, props: Props) -> str:
    one = {"Id": props["targetId"], "Port": int(props["port"])}
    account.client("elbv2").register_targets(TargetGroupArn=props["targetGroupArn"], Targets=[one])
    return f"{props['targetGroupArn']}|{props['targetId']}"


def no_target(account: Account, made_id: str, props: Props) -> None:
    one = {"Id": props["targetId"]}
    account.client("elbv2").deregister_targets(TargetGroupArn=props["targetGroupArn"], Targets=[one])


def lustre(account: Account, props: Props) -> str:
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
    return made["FileSystemId"]


def efs(account: Account, props: Props) -> str:
    asked = {"Encrypted": props["encrypted"], "ThroughputMode": props["throughputMode"]}
    return account.client("efs").create_file_system(**asked, Tags=tags(props))["FileSystemId"]


def mount_target(account: Account, props: Props) -> str:
    asked = {"FileSystemId": props["fileSystemId"], "SubnetId": props["subnetId"]}
    made = account.client("efs").create_mount_target(**asked, SecurityGroups=props["securityGroups"])
    return made["MountTargetId"]


def budget(account: Account, props: Props) -> str:
    asked = {
        "BudgetName": props["name"],
        "BudgetType": props["budgetType"],
        "TimeUnit": props["timeUnit"],
        "BudgetLimit": {"Amount": props["limitAmount"], "Unit": props["limitUnit"]},
        "CostFilters": {each["name"]: each["values"] for each in props["costFilters"]},
    }
    account.client("budgets").create_budget(AccountId=ACCOUNT, Budget=asked)
    return f"{ACCOUNT}:{props['name']}"


def no_budget(account: Account, made_id: str, props: Props) -> None:
    account.client("budgets").delete_budget(AccountId=ACCOUNT, BudgetName=props["name"])
