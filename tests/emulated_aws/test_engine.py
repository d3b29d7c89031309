"""A fleet's whole life on AWS: the real engine, the real SDK, an emulated account. The tests go on from each other."""

from __future__ import annotations

import pytest

from gpuyard.handover import read_handover
from gpuyard.handover.inventory import build
from gpuyard.plan.lock import load_lock
from tests.emulated_aws.fleet import EmulatedFleet

pytestmark = pytest.mark.engine


def gpu_nodes(fleet: EmulatedFleet) -> list[str]:
    return sorted(name for name in fleet.instances() if "-large-" in name)


def test_what_the_account_holds_is_what_was_decided_card_by_card(p5en: EmulatedFleet):
    assert gpu_nodes(p5en) == [f"aws-p5en-large-{n}" for n in range(4)]
    machines = p5en.instances()
    assert {machines[name]["Placement"]["AvailabilityZone"] for name in gpu_nodes(p5en)} == {"us-east-1b"}
    assert {machines[name]["InstanceType"] for name in gpu_nodes(p5en)} == {"p5en.48xlarge"}
    data = p5en.template("aws-p5en-large-us-east-1b")
    cards = [(c["NetworkCardIndex"], c["DeviceIndex"], c["InterfaceType"]) for c in data["NetworkInterfaces"]]
    # As EC2 publishes it of p5en: sixteen cards, the first with IP on device 0 and EFA on device 1.
    assert cards == [(0, 0, "interface"), (0, 1, "efa-only"), *((card, 0, "efa-only") for card in range(1, 16))]
    assert not any("AssociatePublicIpAddress" in card for card in data["NetworkInterfaces"])
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


def test_the_nodes_stand_in_a_placement_group_which_moto_lacks(p5en: EmulatedFleet):
    name = p5en.template("aws-p5en-large-us-east-1b")["Placement"]["GroupName"]
    assert p5en.account.beside("placement")[name]["strategy"] == "cluster"


def test_from_outside_the_account_opens_one_port_to_the_clients(p5en: EmulatedFleet):
    groups = p5en.account.client("ec2").describe_security_groups()["SecurityGroups"]
    inward = [
        (rule["FromPort"], rule["ToPort"], [each["CidrIp"] for each in rule["IpRanges"]])
        for group in groups
        for rule in group["IpPermissions"]
        if rule["IpRanges"]
    ]
    assert inward == [(8080, 8080, ["198.51.100.0/24"])]
    fabric = next(group for group in groups if group["GroupName"] == "aws-p5en-fabric-group")
    for rules in (fabric["IpPermissions"], fabric["IpPermissionsEgress"]):
        assert [(rule["IpProtocol"], [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]) for rule in rules] == [
            ("-1", [fabric["GroupId"]])
        ]


def test_everything_that_can_be_tagged_names_the_fleet_and_there_are_few_for_each_node(p5en: EmulatedFleet):
    state = p5en.state()
    assert len(state) <= 8 * len(p5en.instances())
    bare = [
        resource["urn"]
        for resource in state
        if "tags" in resource["inputs"] and resource["inputs"]["tags"].get("gpuyard:fleet") != "aws-p5en"
    ]
    assert bare == []


def test_lustre_with_efa_is_asked_for_which_moto_cannot_show(p5en: EmulatedFleet):
    lustre = next(resource for resource in p5en.state() if resource["type"].startswith("aws:fsx"))["inputs"]
    assert (lustre["storageCapacity"], lustre["perUnitStorageThroughput"], lustre["efaEnabled"]) == (9600, 500, True)
    assert len(p5en.account.client("fsx").describe_file_systems()["FileSystems"]) == 1


def test_the_handover_makes_an_inventory_over_sessions_of_the_systems_manager(p5en: EmulatedFleet):
    handover = read_handover(p5en.handover())
    lock = load_lock(p5en.project / "fleets/aws-p5en.lock.yaml")
    inventory = build(handover, lock)
    assert inventory.groups["gpu_nodes"] == gpu_nodes(p5en)
    assert inventory.groups["gateways"] == ["aws-p5en-gateway-0", "aws-p5en-gateway-1"]
    machine = p5en.instances()["aws-p5en-large-0"]
    told = inventory.hostvars["aws-p5en-large-0"]
    assert told["ansible_host"] == machine["PrivateIpAddress"]
    assert f"--target {machine['InstanceId']}" in str(told["ansible_ssh_common_args"])
    assert (handover.shared_storage[0].kind, handover.shared_storage[0].path) == ("lustre", "/mnt/lustre")
    assert handover.endpoint.startswith("http://aws-p5en-gateway-")


def test_another_up_changes_nothing_and_another_lock_touches_no_machine(p5en: EmulatedFleet):
    assert p5en.up() == []
    p5en.edit('branch: "580"', 'branch: "590"')
    assert p5en.up() == []


def test_another_image_is_for_machines_to_come(p5en: EmulatedFleet):
    before = p5en.instances()
    p5en.edit("ami-0123456789abcdef0", "ami-0fedcba9876543210")
    acts = p5en.up()
    assert {act for act, _ in acts} == {"update"}
    assert all(name.endswith("-template") for _, name in acts)
    assert {name: one["InstanceId"] for name, one in p5en.instances().items()} == {
        name: one["InstanceId"] for name, one in before.items()
    }
    assert p5en.template("aws-p5en-large-us-east-1b")["ImageId"] == "ami-0fedcba9876543210"


def test_a_pool_grows_and_shrinks_by_just_those_nodes(p5en: EmulatedFleet):
    p5en.edit("    nodes: 4\n", "    nodes: 6\n")
    assert p5en.up() == [("create", "aws-p5en-large-4"), ("create", "aws-p5en-large-5")]
    p5en.edit("    nodes: 6\n", "    nodes: 3\n")
    assert p5en.up() == [("delete", f"aws-p5en-large-{n}") for n in (3, 4, 5)]
    assert gpu_nodes(p5en) == [f"aws-p5en-large-{n}" for n in range(3)]


def test_a_fault_of_the_account_is_told_and_the_next_up_goes_on(p5en: EmulatedFleet):
    p5en.edit("    nodes: 3\n", "    nodes: 4\n")
    p5en.faults({"act": "create", "type": "instance:Instance", "code": "RequestLimitExceeded"})
    failed = p5en.pulumi("up", "--yes", "--skip-preview")
    assert failed.returncode != 0
    assert "RequestLimitExceeded" in failed.stdout
    assert p5en.up() == [("create", "aws-p5en-large-3")]


def test_bad_input_is_refused_before_anything_is_created(p5en: EmulatedFleet):
    p5en.edit("zones: [us-east-1b]}", "zones: [us-east-1b], network_cards: 17}")
    p5en.forget()
    refused = p5en.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    assert "AWS-CARDS: pools[0].aws.network_cards: 17 cards with EFA" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert p5en.acts() == []
    p5en.edit(", network_cards: 17}", "}")


def test_destroy_leaves_nothing(p5en: EmulatedFleet):
    p5en.done("destroy", "--yes", "--skip-preview")
    assert p5en.state() == []
    assert p5en.left() == []


def test_a_type_or_an_input_that_the_emulation_does_not_know_is_an_error(p5en: EmulatedFleet):
    for program, told in (
        ("aws.sqs.Queue('q')", "the emulated AWS has no aws:sqs/queue:Queue"),
        ("aws.ec2.Vpc('v', cidr_block='10.0.0.0/16', enable_dns_support=False)", "does not know enableDnsSupport"),
    ):
        (p5en.project / "stacks/__main__.py").write_text(f"import pulumi_aws as aws\n{program}\n")
        refused = p5en.pulumi("up", "--yes", "--skip-preview", "-c", "aws:region=us-east-1")
        assert refused.returncode != 0
        assert told in refused.stdout
