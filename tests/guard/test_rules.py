"""What must not come of a `pulumi up`: each rule both ways, and the SDK's own word on replacements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gpuyard.cli import app
from gpuyard.cli.guard import documented_to_replace
from gpuyard.guard import Resource, read
from gpuyard.guard.rules import Allowed, findings
from gpuyard.provision import Ref
from gpuyard.provision.aws import wanted
from gpuyard.provision.refusals import Machines
from gpuyard.spec.loader import load_fleet

PROJECT = Path(__file__).parents[2]
INSTANCE, TEMPLATE = "aws:ec2/instance:Instance", "aws:ec2/launchTemplate:LaunchTemplate"
GROUP = "aws:ec2/securityGroup:SecurityGroup"
RESERVATION = "aws:ec2/capacityReservation:CapacityReservation"
BLOCK = "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock"
LATER = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
FOUR = {"blockPublicAcls": True, "blockPublicPolicy": True, "ignorePublicAcls": True, "restrictPublicBuckets": True}
MANAGED = "arn:aws:iam::aws:policy"
IMDSV2 = {"metadataOptions": {"httpTokens": "required"}}
GOOD_DISK = {"deviceName": "/dev/xvda", "ebs": {"encrypted": "true"}}
GOOD_TEMPLATE: dict[str, Any] = {**IMDSV2, "blockDeviceMappings": [GOOD_DISK]}
GOOD_MACHINE: dict[str, Any] = {
    "instanceType": "g6e.12xlarge",
    "metadataOptions": {"httpTokens": "required"},
    "rootBlockDevice": {"encrypted": True},
}


def rules(*resources: Resource, **allowed: Any) -> list[str]:
    found = findings(resources, Allowed(**allowed))
    assert all(finding.change and finding.why for finding in found)
    return [finding.rule for finding in found]


def one(kind: str, **inputs: Any) -> Resource:
    return Resource(kind, "it", inputs)


def ingress(port: int, source: str, last: int | None = None, protocol: str = "tcp") -> dict[str, Any]:
    its = {"fromPort": port, "toPort": last or port, "protocol": protocol}
    return {**its, "ipv6CidrBlocks" if ":" in source else "cidrBlocks": [source]}


def policy(**statement: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement}]})


def let_in(**condition: Mapping[str, object]) -> Resource:
    """A bucket's policy for everybody under a condition."""
    text = policy(Action="s3:GetObject", Principal="*", Resource="arn:aws:s3:::models/*", Condition=condition)
    return one("aws:s3/bucketPolicy:BucketPolicy", policy=text)


def trusted(**condition: Mapping[str, object]) -> Resource:
    """A role for everybody under a condition."""
    text = policy(Action="sts:AssumeRole", Principal={"AWS": "*"}, Condition=condition)
    return one("aws:iam/role:Role", assumeRolePolicy=text)


def may(resource: str | list[str], **more: Any) -> Resource:
    return one("aws:iam/groupPolicy:GroupPolicy", policy=policy(Action="s3:GetObject", Resource=resource, **more))


REFUSED: Mapping[str, tuple[Resource, str]] = {
    "SSH from anywhere": (one(GROUP, ingress=[ingress(22, "0.0.0.0/0")]), "GUARD-OPEN-GROUP"),
    "anything from anywhere, IPv6": (one(GROUP, ingress=[ingress(0, "::/0", protocol="-1")]), "GUARD-OPEN-GROUP"),
    "a range that has the gateway's port": (one(GROUP, ingress=[ingress(8080, "0.0.0.0/0", 8090)]), "GUARD-OPEN-GROUP"),
    "a rule of its own": (
        one("aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule", cidrIpv4="0.0.0.0/0", fromPort=22, toPort=22),
        "GUARD-OPEN-GROUP",
    ),
    "an old kind of rule": (
        one("aws:ec2/securityGroupRule:SecurityGroupRule", type="ingress", **ingress(22, "0.0.0.0/0")),
        "GUARD-OPEN-GROUP",
    ),
    "half of the world": (one(GROUP, ingress=[ingress(22, "128.0.0.0/1")]), "GUARD-OPEN-GROUP"),
    "both halves of the world": (
        one(GROUP, ingress=[{**ingress(22, ""), "cidrBlocks": ["0.0.0.0/1", "128.0.0.0/1"]}]),
        "GUARD-OPEN-GROUP",
    ),
    "the world in 256 parts": (
        one(GROUP, ingress=[ingress(22, f"{number}.0.0.0/8") for number in range(256)]),
        "GUARD-OPEN-GROUP",
    ),
    "the world of IPv6 in two parts": (
        one(GROUP, ingress=[ingress(22, "::/1"), ingress(22, "8000::/1")]),
        "GUARD-OPEN-GROUP",
    ),
    "seven bits": (one(GROUP, ingress=[ingress(22, "10.0.0.0/7")]), "GUARD-OPEN-GROUP"),
    "fifteen bits of IPv6": (one(GROUP, ingress=[ingress(22, "2600::/15")]), "GUARD-OPEN-GROUP"),
    "the VPC's own group": (
        one("aws:ec2/defaultSecurityGroup:DefaultSecurityGroup", ingress=[ingress(22, "0.0.0.0/0")]),
        "GUARD-OPEN-GROUP",
    ),
    "IMDSv1 by default": (one(TEMPLATE, blockDeviceMappings=[GOOD_DISK]), "GUARD-IMDS"),
    "IMDSv1 by name": (one(INSTANCE, **{**GOOD_MACHINE, "metadataOptions": {"httpTokens": "optional"}}), "GUARD-IMDS"),
    "a bare root volume": (one(INSTANCE, **{**GOOD_MACHINE, "rootBlockDevice": {}}), "GUARD-UNENCRYPTED"),
    "a root volume by default": (one(INSTANCE, metadataOptions={"httpTokens": "required"}), "GUARD-UNENCRYPTED"),
    "a template's bare volume": (
        one(TEMPLATE, **{**GOOD_TEMPLATE, "blockDeviceMappings": [{**GOOD_DISK, "ebs": {"volumeSize": 100}}]}),
        "GUARD-UNENCRYPTED",
    ),
    "a template that says nothing of its volumes": (one(TEMPLATE, **IMDSV2), "GUARD-UNENCRYPTED"),
    "a template that says nothing of its root": (
        one(TEMPLATE, **IMDSV2, blockDeviceMappings=[{**GOOD_DISK, "deviceName": "/dev/sdf"}]),
        "GUARD-UNENCRYPTED",
    ),
    "a machine of a template that nobody shows": (
        one(INSTANCE, **IMDSV2, launchTemplate={"id": "lt-0123456789abcdef0", "version": "$Latest"}),
        "GUARD-UNENCRYPTED",
    ),
    "metadata of a template that nobody shows": (
        one(INSTANCE, launchTemplate={"name": "golden"}, rootBlockDevice={"encrypted": True}),
        "GUARD-IMDS",
    ),
    "a machine of a template, with a root of its own": (
        one(INSTANCE, launchTemplate={"id": LATER}, rootBlockDevice={"volumeSize": 100}),
        "GUARD-UNENCRYPTED",
    ),
    "a bare EFS": (one("aws:efs/fileSystem:FileSystem"), "GUARD-UNENCRYPTED"),
    "every action of a service": (
        one("aws:iam/rolePolicy:RolePolicy", policy=policy(Action="s3:*", Resource="arn:aws:s3:::b/*")),
        "GUARD-WILDCARD-IAM",
    ),
    "every resource": (
        one("aws:iam/policy:Policy", policy=policy(Action=["s3:GetObject"], Resource="*")),
        "GUARD-WILDCARD-IAM",
    ),
    "all but some": (
        one("aws:iam/policy:Policy", policy=policy(NotAction="iam:*", Resource="a")),
        "GUARD-WILDCARD-IAM",
    ),
    "a role for everybody": (
        one("aws:iam/role:Role", assumeRolePolicy=policy(Action="sts:AssumeRole", Principal={"AWS": "*"})),
        "GUARD-WILDCARD-IAM",
    ),
    "all resources but some": (
        one("aws:iam/policy:Policy", policy=policy(Action="s3:GetObject", NotResource="arn:aws:s3:::secret/*")),
        "GUARD-WILDCARD-IAM",
    ),
    "an action by its length": (
        one("aws:iam/userPolicy:UserPolicy", policy=policy(Action="iam:???????e", Resource="arn:aws:s3:::models/*")),
        "GUARD-WILDCARD-IAM",
    ),
    "every action, in a group's policy": (
        one("aws:iam/groupPolicy:GroupPolicy", policy=policy(Action="*", Resource="arn:aws:s3:::models/*")),
        "GUARD-WILDCARD-IAM",
    ),
    "every bucket": (may("arn:aws:s3:::*"), "GUARD-WILDCARD-IAM"),
    "every object of every bucket": (may(["arn:aws:s3:::models/*", "arn:aws:s3:::*/*"]), "GUARD-WILDCARD-IAM"),
    "every resource, spelt out": (may("arn:*:*:*:*:*"), "GUARD-WILDCARD-IAM"),
    "every secret": (may("arn:aws:secretsmanager:us-east-1:111122223333:secret:*"), "GUARD-WILDCARD-IAM"),
    "every state machine": (may("arn:aws:states:us-east-1:111122223333:stateMachine:*"), "GUARD-WILDCARD-IAM"),
    "every log": (may("arn:aws:logs:us-east-1:111122223333:log-group:*:*"), "GUARD-WILDCARD-IAM"),
    "every bucket's manifest": (may("arn:aws:s3:::*/manifest.json"), "GUARD-WILDCARD-IAM"),
    "every queue": (may("arn:aws:sqs:us-east-1:111122223333:*"), "GUARD-WILDCARD-IAM"),
    "an ARN that ends early": (may("arn:aws:s3:*"), "GUARD-WILDCARD-IAM"),
    "every role": (may("arn:aws:iam::111122223333:role/*"), "GUARD-WILDCARD-IAM"),
    "AWS's widest policy": (
        one("aws:iam/rolePolicyAttachment:RolePolicyAttachment", policyArn=f"{MANAGED}/AdministratorAccess"),
        "GUARD-WILDCARD-IAM",
    ),
    "AWS's widest policy but one": (
        one("aws:iam/userPolicyAttachment:UserPolicyAttachment", policyArn=f"{MANAGED}/PowerUserAccess"),
        "GUARD-WILDCARD-IAM",
    ),
    "all of a service": (
        one("aws:iam/groupPolicyAttachment:GroupPolicyAttachment", policyArn=f"{MANAGED}/AmazonS3FullAccess"),
        "GUARD-WILDCARD-IAM",
    ),
    "all of a service, another spelling": (
        one("aws:iam/policyAttachment:PolicyAttachment", policyArn=f"{MANAGED}/AWSLambda_FullAccess"),
        "GUARD-WILDCARD-IAM",
    ),
    "AWS's policy of another partition, in a folder": (
        one(
            "aws:iam/role:Role",
            managedPolicyArns=["arn:aws-us-gov:iam::aws:policy/job-function/DatabaseAdministrator"],
        ),
        "GUARD-WILDCARD-IAM",
    ),
    "a role for everybody but one": (
        one("aws:iam/role:Role", assumeRolePolicy=policy(Action="sts:AssumeRole", NotPrincipal={"AWS": "1" * 12})),
        "GUARD-WILDCARD-IAM",
    ),
    "a role for everybody with a password": (
        trusted(StringEquals={"sts:ExternalId": "gpuyard"}),
        "GUARD-WILDCARD-IAM",
    ),
    "a role for everybody with a second factor": (
        trusted(Bool={"aws:MultiFactorAuthPresent": "true"}),
        "GUARD-WILDCARD-IAM",
    ),
    "a role for a name in any account": (
        trusted(ArnLike={"aws:PrincipalArn": "arn:aws:iam::*:role/node"}),
        "GUARD-WILDCARD-IAM",
    ),
    "everybody over TLS": (let_in(Bool={"aws:SecureTransport": "true"}), "GUARD-PUBLIC-BUCKET"),
    "everybody in any organization": (let_in(StringLike={"aws:PrincipalOrgID": "o-*"}), "GUARD-PUBLIC-BUCKET"),
    "everybody through any endpoint": (let_in(StringLike={"aws:SourceVpce": ["vpce-1", "*"]}), "GUARD-PUBLIC-BUCKET"),
    "everybody but an endpoint": (let_in(StringNotEquals={"aws:SourceVpce": "vpce-1"}), "GUARD-PUBLIC-BUCKET"),
    "everybody that comes through no endpoint": (
        let_in(StringEqualsIfExists={"aws:SourceVpce": "vpce-1"}),
        "GUARD-PUBLIC-BUCKET",
    ),
    "everybody that has none of a set": (
        let_in(**{"ForAllValues:StringEquals": {"aws:PrincipalAccount": "111122223333"}}),
        "GUARD-PUBLIC-BUCKET",
    ),
    "for any bucket's sake": (let_in(ArnLike={"aws:SourceArn": "arn:aws:s3:::*"}), "GUARD-PUBLIC-BUCKET"),
    "an ACL for everybody with an account": (
        one("aws:s3/bucketAcl:BucketAcl", acl="authenticated-read"),
        "GUARD-PUBLIC-BUCKET",
    ),
    "a public ACL": (one("aws:s3/bucketAcl:BucketAcl", acl="public-read"), "GUARD-PUBLIC-BUCKET"),
    "half a block": (one(BLOCK, **{**FOUR, "blockPublicPolicy": False}), "GUARD-PUBLIC-BUCKET"),
    "a policy for everybody": (
        one("aws:s3/bucketPolicy:BucketPolicy", policy=policy(Action="s3:GetObject", Principal="*", Resource="b")),
        "GUARD-PUBLIC-BUCKET",
    ),
    "a bucket without a block": (one("aws:s3/bucket:Bucket"), "GUARD-PUBLIC-BUCKET"),
    "a node that goes": (Resource(INSTANCE, "prod-chat-0", GOOD_MACHINE, act="delete"), "GUARD-NODE"),
    "a node that is replaced": (Resource(INSTANCE, "n", GOOD_MACHINE, act="replace", because=("ami",)), "GUARD-NODE"),
    "a reservation that goes": (Resource(RESERVATION, "block", {}, act="delete"), "GUARD-RESERVATION"),
    "a reservation that is replaced": (Resource(RESERVATION, "block", {}, act="replace"), "GUARD-RESERVATION"),
}


@pytest.mark.parametrize(("resource", "rule"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_lost_or_opened_is_found_by_its_rule_alone(resource: Resource, rule: str) -> None:
    assert rules(resource) == [rule]


PASSES: Mapping[str, Resource] = {
    "the gateway's port from anywhere": one(GROUP, ingress=[ingress(8080, "0.0.0.0/0")]),
    "a network that is named": one(GROUP, ingress=[ingress(22, "10.0.0.0/8")]),
    "the group itself": one(GROUP, ingress=[{"protocol": "-1", "fromPort": 0, "toPort": 0, "self": True}]),
    "eight bits, and sixteen of IPv6": one(GROUP, ingress=[ingress(22, "10.0.0.0/8"), ingress(22, "2600::/16")]),
    "many networks that do not join": one(
        GROUP, ingress=[ingress(22, f"203.0.{number}.0/24") for number in range(256)]
    ),
    "two wide networks on two ports": one(GROUP, ingress=[ingress(22, "10.0.0.0/8"), ingress(443, "11.0.0.0/8")]),
    "a network that is known later": one(GROUP, ingress=[ingress(22, LATER), ingress(22, "no network")]),
    "an open group that goes": Resource(GROUP, "it", {"ingress": [ingress(22, "0.0.0.0/0")]}, act="delete"),
    "a way out": one("aws:ec2/securityGroupRule:SecurityGroupRule", type="egress", **ingress(0, "0.0.0.0/0")),
    "a good machine": one(INSTANCE, **GOOD_MACHINE),
    "a machine of a template": one(INSTANCE, launchTemplate={"id": LATER}),
    "no metadata at all": one(INSTANCE, **{**GOOD_MACHINE, "metadataOptions": {"httpEndpoint": "disabled"}}),
    "a machine of a template that nobody shows, which says all by itself": one(
        INSTANCE, **GOOD_MACHINE, launchTemplate={"name": "golden"}
    ),
    "what is known later": one(TEMPLATE, metadataOptions=LATER, blockDeviceMappings=LATER),
    "a root of a name that is known later": one(
        TEMPLATE, **IMDSV2, blockDeviceMappings=[{**GOOD_DISK, "deviceName": LATER}]
    ),
    "a template's volume, in its own words": one(TEMPLATE, **GOOD_TEMPLATE),
    "a root of the other name, and a disk that is left out": one(
        TEMPLATE,
        **IMDSV2,
        blockDeviceMappings=[{**GOOD_DISK, "deviceName": "/dev/sda1"}, {"deviceName": "/dev/sdf", "noDevice": ""}],
    ),
    "an encrypted EFS": one("aws:efs/fileSystem:FileSystem", encrypted=True),
    "one action on one bucket": one(
        "aws:iam/policy:Policy", policy=policy(Action="s3:GetObject", Resource="arn:aws:s3:::models/*")
    ),
    "a wide denial": one("aws:iam/policy:Policy", policy=policy(Action="s3:*", Resource="*").replace("Allow", "Deny")),
    "a policy that is known later": one("aws:iam/policy:Policy", policy=LATER),
    "a service's role": one(
        "aws:iam/role:Role",
        assumeRolePolicy=policy(Action="sts:AssumeRole", Principal={"Service": "ec2.amazonaws.com"}),
    ),
    "one group's streams of a log": may("arn:aws:logs:us-east-1:111122223333:log-group:/fleet:*"),
    "a bucket and its objects": may(["arn:aws:s3:::models", "arn:aws:s3:::models/*"]),
    "secrets of a folder": may("arn:aws:secretsmanager:us-east-1:111122223333:secret:fleet/*"),
    "one API": may("arn:aws:execute-api:us-east-1:111122223333:a1b2c3d4e5/*"),
    "queues by their first letters": may("arn:aws:sqs:us-east-1:111122223333:fleet-*"),
    "some roles": may("arn:aws:iam::111122223333:role/fleet-*"),
    "the sessions of the Systems Manager": one(
        "aws:iam/rolePolicyAttachment:RolePolicyAttachment", policyArn=f"{MANAGED}/AmazonSSMManagedInstanceCore"
    ),
    "a policy of one's own": one(
        "aws:iam/role:Role", managedPolicyArns=["arn:aws:iam::111122223333:policy/fleet-FullAccess", LATER]
    ),
    "a role for everybody in the organization": trusted(StringEquals={"aws:PrincipalOrgID": "o-abcdefghij"}),
    "a role for some of an account": trusted(ArnLike={"aws:PrincipalArn": "arn:aws:iam::111122223333:role/node-*"}),
    "a bucket for an account, over TLS": let_in(
        Bool={"aws:SecureTransport": "true"}, StringLike={"AWS:principalaccount": ["111122223333"]}
    ),
    "a bucket for a bucket's sake": let_in(ArnEquals={"aws:SourceArn": "arn:aws:s3:::logs"}),
    "a bucket for a VPC": let_in(**{"ForAnyValue:StringEquals": {"aws:SourceVpc": "vpc-1"}}),
    "a bucket under a condition that is known later": one(
        "aws:s3/bucketPolicy:BucketPolicy",
        policy={"Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Condition": LATER}]},
    ),
    "nobody without TLS": one(
        "aws:s3/bucketPolicy:BucketPolicy",
        policy=policy(Action="s3:*", Principal="*", Resource="*").replace("Allow", "Deny"),
    ),
    "a whole block": one(BLOCK, **FOUR),
    "a policy through an endpoint": one(
        "aws:s3/bucketPolicy:BucketPolicy",
        policy=policy(Action="s3:GetObject", Principal="*", Condition={"StringEquals": {"aws:sourceVpce": "vpce-1"}}),
    ),
    "a new node": Resource(INSTANCE, "n", GOOD_MACHINE, act="create"),
    "another tag": Resource(INSTANCE, "n", {**GOOD_MACHINE, "tags": {"a": "b"}}, GOOD_MACHINE, act="update"),
    "a new reservation": Resource(RESERVATION, "block", {}, act="create"),
}


@pytest.mark.parametrize("resource", PASSES.values(), ids=PASSES)
def test_what_is_safe_is_let_through(resource: Resource) -> None:
    assert rules(resource) == []


def test_a_bucket_with_its_block_passes() -> None:
    assert rules(one("aws:s3/bucket:Bucket"), one(BLOCK, **FOUR)) == []


def test_a_machine_is_as_encrypted_as_the_template_that_it_is_made_of() -> None:
    """Judged once, at the template; also in a state, where what the template is called is known."""
    of = {"launchTemplate": {"id": "lt-0123456789abcdef0"}}
    machine = Resource(INSTANCE, "n", of, made_of=("urn-of-it",))
    for template, expected in ((GOOD_TEMPLATE, []), (IMDSV2, ["GUARD-UNENCRYPTED"])):
        assert rules(Resource(TEMPLATE, "t", template, urn="urn-of-it"), machine) == expected
    assert rules(Resource(TEMPLATE, "t", GOOD_TEMPLATE, urn="another"), machine) == ["GUARD-IMDS", "GUARD-UNENCRYPTED"]


def test_a_policy_that_is_part_of_its_bucket_is_one_too() -> None:
    everybody = policy(Action="s3:GetObject", Principal="*", Resource="arn:aws:s3:::models/*")
    assert rules(one("aws:s3/bucket:Bucket", policy=everybody), one(BLOCK, **FOUR)) == ["GUARD-PUBLIC-BUCKET"]


def test_consent_names_what_goes() -> None:
    node, block = Resource(INSTANCE, "a", GOOD_MACHINE, act="delete"), Resource(RESERVATION, "b", {}, act="delete")
    assert rules(node, block, drained=frozenset({"a"}), released=frozenset({"b"})) == []
    assert rules(node, drained=frozenset({"other"})) == ["GUARD-NODE"]


def test_cost_is_held_to_the_plan_and_an_unknown_price_is_no_price() -> None:
    machines = [Resource(INSTANCE, f"n{n}", GOOD_MACHINE, act="create") for n in range(3)]
    priced: dict[str, Any] = {"price": lambda kind, _: {"g6e.12xlarge": 10.0}.get(kind)}
    assert rules(*machines, usd_per_hour=30.0, **priced) == []
    assert rules(*machines, usd_per_hour=29.0, **priced) == ["GUARD-COST"]
    other = Resource(INSTANCE, "n", {**GOOD_MACHINE, "instanceType": "p9.48xlarge"}, act="create")
    assert rules(other, usd_per_hour=30.0, **priced) == ["GUARD-COST"]
    assert rules(
        *machines, Resource(INSTANCE, "n", {"launchTemplate": LATER}, act="create"), usd_per_hour=99.0, **priced
    ) == ["GUARD-COST"], "a machine of no known type"
    gone = Resource(INSTANCE, "n9", GOOD_MACHINE, act="delete")
    assert rules(*machines, gone, usd_per_hour=30.0, drained=frozenset({"n9"}), **priced) == []


@pytest.mark.parametrize(
    ("kind", "key", "forces"),
    [
        ("aws:s3/filesFileSystemPolicy:FilesFileSystemPolicy", "fileSystemId", True),
        ("aws:ec2/launchTemplate:LaunchTemplate", "name", False),
        ("aws:ec2/ami:Ami", "virtualizationType", False),
        (INSTANCE, "tags", False),
        (INSTANCE, "userData", False),
        ("aws:nothing/here:Here", "name", False),
        ("pulumi-python:dynamic:Resource", "name", False),
    ],
)
def test_a_replacement_is_told_where_the_sdk_documents_it_and_not_guessed(kind: str, key: str, forces: bool) -> None:
    assert documented_to_replace(kind, key) is forces


def test_a_machine_has_the_type_of_the_template_that_it_is_made_of() -> None:
    """Preview and state tell which one that is, also while its id is known later."""

    def step(kind: str, name: str, inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"op": "create", "urn": urn(kind, name), "newState": {"type": kind, "inputs": inputs, **more}}

    spot = {"instanceMarketOptions": {"marketType": "spot"}}
    steps = [
        step(TEMPLATE, "large", {**GOOD_TEMPLATE, "instanceType": "p5.48xlarge"}),
        step(TEMPLATE, "small", {**GOOD_TEMPLATE, **spot, "instanceType": "g6e.12xlarge"}),
        step(
            INSTANCE, "a", {"launchTemplate": LATER}, propertyDependencies={"launchTemplate": [urn(TEMPLATE, "large")]}
        ),
        step(
            INSTANCE, "b", {"launchTemplate": LATER}, propertyDependencies={"launchTemplate": [urn(TEMPLATE, "small")]}
        ),
    ]
    asked: list[tuple[str, str]] = []
    allowed = Allowed(usd_per_hour=1.0, price=lambda *of: asked.append(of) or 0.5)
    assert findings(read({"steps": steps}), allowed) == []
    assert asked == [("p5.48xlarge", "on-demand"), ("g6e.12xlarge", "spot")]


# --- our own fleets --------------------------------------------------------------------------------------------------


def as_previewed(row: Mapping[str, Any], name: str) -> Resource:
    """Of the previews that are kept for review; `<name>` there is what is known later."""

    def plain(value: Any) -> Any:
        match value:
            case dict():
                return {key: plain(item) for key, item in value.items()}
            case list():
                return [plain(item) for item in value]
            case str() if value.startswith("<"):
                return LATER
            case _:
                return value

    template = str((row.get("launchTemplate") or {}).get("id", "")).strip("<>")
    return Resource(row["type"], name, plain(row), act="create", urn=name, made_of=(template,) if template else ())


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "tests/emulated_aws/previews").glob("*.yaml")), ids=lambda it: it.stem
)
def test_what_our_own_program_makes_is_clean(path: Path) -> None:
    resources = [as_previewed(row, name) for name, row in yaml.safe_load(path.read_text()).items()]
    assert {INSTANCE, TEMPLATE, GROUP, BLOCK} <= {resource.type for resource in resources}
    assert rules(*resources) == []


def test_our_bucket_s_policy_is_clean_and_would_not_be_without_its_condition() -> None:
    def known(value: Any) -> Any:
        return "vpce-0123456789abcdef0" if isinstance(value, Ref) else value

    fleet = load_fleet(PROJECT / "fleets/aws-p5en.yaml")
    [made] = [item for item in wanted(fleet, Machines.known()) if item.kind == "s3.BucketPolicy"]
    text = json.dumps(made.inputs["policy"].data, default=known)
    assert rules(one("aws:s3/bucketPolicy:BucketPolicy", policy=text)) == []
    other = text.replace("aws:SourceVpce", "aws:UserAgent")
    assert rules(one("aws:s3/bucketPolicy:BucketPolicy", policy=other)) == ["GUARD-PUBLIC-BUCKET"]


# --- files -----------------------------------------------------------------------------------------------------------


def urn(kind: str, name: str) -> str:
    return f"urn:pulumi:prod::gpuyard::gpuyard:aws:Fleet${kind}::{name}"


def test_a_preview_and_a_state_are_read(tmp_path: Path) -> None:
    steps = [
        {"op": "delete", "urn": urn(INSTANCE, "prod-chat-1"), "oldState": {"type": INSTANCE, "inputs": GOOD_MACHINE}},
        {"op": "delete-replaced", "urn": urn(INSTANCE, "prod-chat-0"), "oldState": {"type": INSTANCE}},
        {
            "op": "replace",
            "urn": urn(INSTANCE, "prod-chat-0"),
            "oldState": {"type": INSTANCE, "inputs": GOOD_MACHINE},
            "newState": {"type": INSTANCE, "inputs": {**GOOD_MACHINE, "ami": "ami-2"}},
            "replaceReasons": ["ami"],
        },
    ]
    found = findings(read({"steps": steps}), Allowed())
    assert [(finding.rule, finding.resource) for finding in found] == [
        ("GUARD-NODE", "prod-chat-1"),
        ("GUARD-NODE", "prod-chat-0"),
    ]
    assert "because of ami" in found[1].found
    state = {"version": 3, "deployment": {"resources": [{"urn": urn(GROUP, "g"), "type": GROUP, "inputs": {}}]}}
    state["deployment"]["resources"][0]["inputs"] = {"ingress": [ingress(22, "0.0.0.0/0")]}  # type: ignore[index]
    path = tmp_path / "state.json"
    path.write_text(json.dumps(state))
    ran = CliRunner().invoke(app, ["guard", str(path), "--json"])
    assert ran.exit_code == 1
    assert [finding["rule"] for finding in json.loads(ran.output)["findings"]] == ["GUARD-OPEN-GROUP"]


def test_the_cost_of_a_fleet_is_compared_with_its_plan(tmp_path: Path) -> None:
    machine = {**GOOD_MACHINE, "instanceType": "p5.48xlarge"}
    rows = [{"urn": urn(INSTANCE, f"prod-large-{n}"), "type": INSTANCE, "inputs": machine} for n in range(9)]
    path = tmp_path / "state.json"
    for number, code in ((3, 0), (9, 1)):
        path.write_text(json.dumps({"deployment": {"resources": rows[:number]}}))
        ran = CliRunner().invoke(app, ["guard", str(path), "--fleet", str(PROJECT / "fleets/prod.yaml")])
        assert ran.exit_code == code, ran.output
    assert "GUARD-COST" in ran.output  # pyright: ignore[reportPossiblyUnboundVariable]


def test_a_preview_that_leaves_out_what_stays_is_refused(tmp_path: Path) -> None:
    """As the engine writes it unless it is told `--show-sames`: the stack itself is there, the rest is a number."""
    same = {
        "op": "same",
        "urn": urn("pulumi:pulumi:Stack", "gpuyard-prod"),
        "newState": {"type": "pulumi:pulumi:Stack"},
    }
    path = tmp_path / "preview.json"
    for summary, code in (({"same": 1}, 0), ({"same": 54}, 3)):
        path.write_text(json.dumps({"steps": [same], "changeSummary": summary}))
        ran = CliRunner().invoke(app, ["guard", str(path)])
        assert ran.exit_code == code, ran.output
    assert "GUARD-FILE: 53 resources left out" in ran.output  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("text", ["", "{}", "[]", "no json", '{"steps": 3}'])
def test_what_is_neither_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    assert CliRunner().invoke(app, ["guard", str(path)]).exit_code == 3
    assert CliRunner().invoke(app, ["guard", str(tmp_path / "none.json")]).exit_code == 3
