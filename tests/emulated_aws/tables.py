"""What the emulated AWS can make: a row for each type of resource. Nothing is made that has no row.

A row that moto cannot hold whole says so in `lacks`; what it cannot hold is checked in the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.emulated_aws import makes as m
from tests.emulated_aws.account import ACCOUNT, Account
from tests.emulated_aws.kinds import Kind, Props, alive, ec2, specified, tags, there


def other(token: str, inputs: str, create: Any, ask: Any, delete: Any, *outputs: Any, **more: Any) -> Kind:
    return Kind(token, frozenset(inputs.split()), create, there(ask), delete, *outputs, **more)


def arn(account: Account, made_id: str, props: Props) -> Props:
    return {"arn": made_id}


_TEMPLATE = (
    "name imageId instanceType keyName iamInstanceProfile metadataOptions blockDeviceMappings networkInterfaces "
    "placement tagSpecifications instanceMarketOptions capacityReservationSpecification"
)
_LUSTRE = (
    "deploymentType storageType storageCapacity perUnitStorageThroughput subnetIds securityGroupIds efaEnabled "
    "dataCompressionType fileSystemTypeVersion metadataConfiguration tags"
)
_SHUT = "bucket blockPublicAcls blockPublicPolicy ignorePublicAcls restrictPublicBuckets"


def _elb(call: str, argument: str) -> Callable[[Account, str], Any]:
    return lambda account, made_id: getattr(account.client("elbv2"), call)(**{argument: [made_id]})


ROWS = (
    ec2(
        "Vpc",
        "cidrBlock enableDnsHostnames",
        m.vpc,
        ("describe_vpcs", "VpcIds"),
        lambda c, i, p: c.delete_vpc(VpcId=i),
        m.default_table,
        m.dns_hostnames,
        later=("enableDnsHostnames",),
    ),
    ec2(
        "InternetGateway",
        "vpcId",
        m.internet_gateway,
        ("describe_internet_gateways", "InternetGatewayIds"),
        m.no_internet_gateway,
        update=m.attached,
        later=("vpcId",),
    ),
    ec2(
        "Subnet",
        "vpcId availabilityZone cidrBlock",
        m.subnet,
        ("describe_subnets", "SubnetIds"),
        lambda c, i, p: c.delete_subnet(SubnetId=i),
    ),
    ec2(
        "Eip",
        "domain",
        m.eip,
        ("describe_addresses", "AllocationIds"),
        lambda c, i, p: c.release_address(AllocationId=i),
    ),
    ec2(
        "NatGateway",
        "allocationId subnetId",
        m.nat_gateway,
        ("describe_nat_gateways", "NatGatewayIds"),
        lambda c, i, p: c.delete_nat_gateway(NatGatewayId=i),
    ),
    ec2(
        "RouteTable",
        "vpcId routes",
        m.route_table,
        ("describe_route_tables", "RouteTableIds"),
        lambda c, i, p: c.delete_route_table(RouteTableId=i),
        update=m.routes,
        later=("routes",),
    ),
    ec2(
        "DefaultRouteTable",
        "defaultRouteTableId routes",
        m.default_route_table,
        ("describe_route_tables", "RouteTableIds"),
        lambda c, i, p: None,
        update=m.routes,
        later=("routes",),
    ),
    ec2(
        "SecurityGroup",
        "vpcId description ingress egress",
        m.security_group,
        ("describe_security_groups", "GroupIds"),
        lambda c, i, p: c.delete_security_group(GroupId=i),
        update=m.rules,
        later=("ingress", "egress"),
        seen=lambda a, i, p: m.rules_seen(a.client("ec2"), i, p),
    ),
    ec2(
        "VpcEndpoint",
        "vpcId serviceName vpcEndpointType routeTableIds policy privateDnsEnabled subnetIds securityGroupIds",
        m.vpc_endpoint,
        ("describe_vpc_endpoints", "VpcEndpointIds"),
        lambda c, i, p: c.delete_vpc_endpoints(VpcEndpointIds=[i]),
    ),
    ec2(
        "KeyPair",
        "keyName publicKey",
        lambda c, p: c.import_key_pair(
            KeyName=p["keyName"],
            PublicKeyMaterial=p["publicKey"].encode(),
            TagSpecifications=specified("key-pair", p),
        )["KeyName"],
        ("describe_key_pairs", "KeyNames"),
        lambda c, i, p: c.delete_key_pair(KeyName=i),
        named=True,
    ),
    Kind(
        "aws:ec2/placementGroup:PlacementGroup",
        frozenset({"name", "strategy", "tags"}),
        m.placement_group,
        lambda a, i: i in a.beside("placement"),
        lambda a, i, p: a.keep_beside("placement", i, None),
        named=True,
        lacks="placement groups: they are kept in a file beside moto",
    ),
    ec2(
        "LaunchTemplate",
        _TEMPLATE,
        m.launch_template,
        ("describe_launch_templates", "LaunchTemplateIds"),
        lambda c, i, p: c.delete_launch_template(LaunchTemplateId=i),
        m.latest,
        updates=tuple(set(_TEMPLATE.split()) - {"name"}),
        update=m.new_version,
        named=True,
    ),
    Kind(
        "aws:ec2/routeTableAssociation:RouteTableAssociation",
        frozenset({"subnetId", "routeTableId"}),
        lambda a, p: m.association(a.client("ec2"), p),
        lambda a, i: True,
        lambda a, i, p: a.client("ec2").disassociate_route_table(AssociationId=i),
        known_as=m.association_of,
    ),
    other(
        "aws:ec2/instance:Instance",
        "launchTemplate tags",
        m.instance,
        lambda a, i: alive(m.found(a, i)),
        lambda a, i, p: a.client("ec2").terminate_instances(InstanceIds=[i]),
        outputs=m.address,
        updates=frozenset({"tags"}),
        update=m.retag_instance,
        lacks="network cards but the first, purchase modes",
    ),
    other(
        "aws:iam/role:Role",
        "name assumeRolePolicy tags",
        m.role,
        lambda a, i: a.client("iam").get_role(RoleName=i),
        lambda a, i, p: a.client("iam").delete_role(RoleName=i),
        lambda a, i, p: {"arn": f"arn:aws:iam::{ACCOUNT}:role/{i}", "name": i},
        named=True,
    ),
    other(
        "aws:iam/instanceProfile:InstanceProfile",
        "name role tags",
        m.profile,
        lambda a, i: a.client("iam").get_instance_profile(InstanceProfileName=i),
        m.no_profile,
        lambda a, i, p: {"arn": f"arn:aws:iam::{ACCOUNT}:instance-profile/{i}"},
        updates=frozenset({"role"}),
        update=m.role_in_profile,
        later=frozenset({"role"}),
        named=True,
    ),
    other(
        "aws:iam/rolePolicyAttachment:RolePolicyAttachment",
        "role policyArn",
        m.attachment,
        lambda a, i: True,
        lambda a, i, p: a.client("iam").detach_role_policy(RoleName=p["role"], PolicyArn=i.split("/", 1)[1]),
    ),
    other(
        "aws:s3/bucket:Bucket",
        "bucket tags",
        m.bucket,
        lambda a, i: a.client("s3").head_bucket(Bucket=i),
        lambda a, i, p: a.client("s3").delete_bucket(Bucket=i),
        lambda a, i, p: {"arn": f"arn:aws:s3:::{i}"},
        updates=frozenset({"tags"}),
        update=m.tagged_bucket,
        later=frozenset({"tags"}),
        named=True,
    ),
    other(
        "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock",
        _SHUT,
        m.shut,
        lambda a, i: a.client("s3").get_public_access_block(Bucket=i),
        lambda a, i, p: a.client("s3").delete_public_access_block(Bucket=i),
    ),
    other(
        "aws:s3/bucketPolicy:BucketPolicy",
        "bucket policy",
        m.bucket_policy,
        lambda a, i: a.client("s3").get_bucket_policy(Bucket=i),
        lambda a, i, p: a.client("s3").delete_bucket_policy(Bucket=i),
    ),
    other(
        "aws:lb/loadBalancer:LoadBalancer",
        "name loadBalancerType internal subnets securityGroups enableCrossZoneLoadBalancing tags",
        m.balancer,
        _elb("describe_load_balancers", "LoadBalancerArns"),
        lambda a, i, p: a.client("elbv2").delete_load_balancer(LoadBalancerArn=i),
        m.balancer_name,
        named=True,
    ),
    other(
        "aws:lb/targetGroup:TargetGroup",
        "name port protocol vpcId healthCheck tags",
        m.target_group,
        _elb("describe_target_groups", "TargetGroupArns"),
        lambda a, i, p: a.client("elbv2").delete_target_group(TargetGroupArn=i),
        arn,
        named=True,
    ),
    other(
        "aws:lb/listener:Listener",
        "loadBalancerArn port protocol defaultActions tags",
        m.listener,
        _elb("describe_listeners", "ListenerArns"),
        lambda a, i, p: a.client("elbv2").delete_listener(ListenerArn=i),
        arn,
    ),
    other(
        "aws:lb/targetGroupAttachment:TargetGroupAttachment",
        "targetGroupArn targetId port",
        m.target,
        lambda a, i: True,
        m.no_target,
    ),
    other(
        "aws:fsx/lustreFileSystem:LustreFileSystem",
        _LUSTRE,
        m.lustre,
        lambda a, i: a.client("fsx").describe_file_systems(FileSystemIds=[i])["FileSystems"],
        lambda a, i, p: a.client("fsx").delete_file_system(FileSystemId=i),
        lambda a, i, p: {"dnsName": f"{i}.fsx.{a.region}.amazonaws.com", "mountName": "emulated"},
        lacks="EFA, metadata",
    ),
    other(
        "aws:efs/fileSystem:FileSystem",
        "encrypted throughputMode tags",
        m.efs,
        lambda a, i: a.client("efs").describe_file_systems(FileSystemId=i),
        lambda a, i, p: a.client("efs").delete_file_system(FileSystemId=i),
        lambda a, i, p: {"dnsName": f"{i}.efs.{a.region}.amazonaws.com"},
        updates=frozenset({"tags"}),
        update=lambda a, i, p: a.client("efs").tag_resource(ResourceId=i, Tags=tags(p)),
    ),
    other(
        "aws:efs/mountTarget:MountTarget",
        "fileSystemId subnetId securityGroups",
        m.mount_target,
        lambda a, i: a.client("efs").describe_mount_targets(MountTargetId=i),
        lambda a, i, p: a.client("efs").delete_mount_target(MountTargetId=i),
    ),
    other(
        "aws:budgets/budget:Budget",
        "name budgetType timeUnit limitAmount limitUnit costFilters notifications tags",
        m.budget,
        lambda a, i: a.client("budgets").describe_budget(AccountId=ACCOUNT, BudgetName=i.split(":")[1]),
        m.no_budget,
        named=True,
        lacks="notifications",
    ),
)
KINDS = {row.token: row for row in ROWS}
