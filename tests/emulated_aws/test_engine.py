"""A fleet's whole life on AWS: the real engine, the real SDK, an emulated account. The tests go on from each other."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess

import pytest

from gpuyard.handover import read_handover
from gpuyard.handover.inventory import build
from gpuyard.plan.lock import load_lock
from gpuyard.provision import name_in
from gpuyard.provision.protection import machine_urn
from tests.emulated_aws.fleet import EmulatedFleet
from tests.emulated_aws.readback import Readback, astray

pytestmark = pytest.mark.engine


def gpu_nodes(fleet: EmulatedFleet) -> list[str]:
    return sorted(name for name in fleet.instances() if "-large-" in name)


def test_what_the_account_holds_is_what_ec2_publishes_card_by_card(p5en: EmulatedFleet):
    assert gpu_nodes(p5en) == [f"aws-p5en-large-{n}" for n in range(4)]
    readback = Readback(p5en)
    assert readback.mismatches() == []
    assert (readback.machines, readback.cards) == (6, 4 * 16)
    # As EC2 publishes it of p5en: sixteen cards, the first with IP on device 0 and EFA on device 1.
    data = p5en.template("aws-p5en-large-us-east-1a")
    cards = [(c["NetworkCardIndex"], c["DeviceIndex"], c["InterfaceType"]) for c in data["NetworkInterfaces"]]
    assert cards == [(0, 0, "interface"), (0, 1, "efa-only"), *((card, 0, "efa-only") for card in range(1, 16))]


def test_a_card_that_is_missing_and_a_machine_that_nobody_asked_for_are_mismatches(p5en: EmulatedFleet):
    ec2, name = p5en.account.client("ec2"), "aws-p5en-large-us-east-1a"
    whole = p5en.template(name)
    data = copy.deepcopy(whole)
    data["NetworkInterfaces"] = [card for card in data["NetworkInterfaces"] if card["NetworkCardIndex"] != 7]
    data["MetadataOptions"]["HttpTokens"] = "optional"
    ec2.create_launch_template_version(LaunchTemplateName=name, LaunchTemplateData=data)
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "aws-p5en-large-9"}]}]
    stray = ec2.run_instances(ImageId=data["ImageId"], MinCount=1, MaxCount=1, TagSpecifications=tags)["Instances"][0]
    found = Readback(p5en).mismatches()
    assert "aws-p5en-large-9 is there and nobody asked for it" in found
    assert "aws-p5en-large-3: card 7 has nothing, and [(0, 'efa-only')] was expected" in found
    assert "aws-p5en-large-3: IMDSv1 is open" in found
    assert len(found) == 1 + 2 * 4
    ec2.terminate_instances(InstanceIds=[stray["InstanceId"]])
    ec2.create_launch_template_version(LaunchTemplateName=name, LaunchTemplateData=whole)


def test_the_nodes_stand_in_a_placement_group_which_moto_lacks(p5en: EmulatedFleet):
    name = p5en.template("aws-p5en-large-us-east-1a")["Placement"]["GroupName"]
    assert p5en.account.beside("placement")[name]["strategy"] == "cluster"


def test_the_fabric_s_group_lets_its_members_alone_talk(p5en: EmulatedFleet):
    groups = p5en.account.client("ec2").describe_security_groups()["SecurityGroups"]
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
    assert told["nvme_cache_disks"] == 8
    assert told["model_store_budget_gib"] == 25480
    assert (handover.shared_storage[0].kind, handover.shared_storage[0].path) == ("lustre", "/mnt/lustre")
    assert handover.endpoint.startswith("http://aws-p5en-gateway-")


def test_another_up_changes_nothing_also_where_the_lock_is_another(p5en: EmulatedFleet):
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
    assert p5en.template("aws-p5en-large-us-east-1a")["ImageId"] == "ami-0fedcba9876543210"


def test_its_state_moves_into_a_bucket_where_all_that_follows_finds_it(p5en: EmulatedFleet, state_bucket: str):
    moved = p5en.project / "state.json"
    p5en.done("stack", "export", "--file", str(moved))
    p5en.environment |= {
        "PULUMI_BACKEND_URL": state_bucket,
        "AWS_ACCESS_KEY_ID": "emulated",
        "AWS_SECRET_ACCESS_KEY": "emulated",
    }
    p5en.done("stack", "select", "--create", p5en.name)
    assert p5en.exported().get("resources", []) == []
    p5en.done("stack", "import", "--file", str(moved))
    assert p5en.up() == []


def test_all_that_is_made_is_protected(p5en: EmulatedFleet):
    state = p5en.state()
    assert [row["urn"] for row in state if not row.get("protect")] == []
    machine = next(row["urn"] for row in state if row["urn"].endswith("::aws-p5en-large-0"))
    assert machine == machine_urn("aws-p5en", "aws-p5en-large-0"), "as the playbooks say it"


@pytest.mark.parametrize("words", [(), ("--skip-preview",)], ids=["plain", "without a preview"])
def test_a_destroy_that_nobody_consented_to_deletes_nothing_and_says_the_line(
    p5en: EmulatedFleet, words: tuple[str, ...]
):
    p5en.forget()
    refused = p5en.pulumi("destroy", "--yes", *words)
    assert refused.returncode != 0
    assert f"`pulumi state unprotect '{machine_urn('aws-p5en', 'aws-p5en-large-0')}'`" in refused.stdout
    assert p5en.acts() == []


def test_what_the_engine_would_replace_is_refused_before_anything_is_done(p5en: EmulatedFleet):
    """That another name is another bucket is the provider's word."""
    p5en.edit("bucket: example-aws-p5en-models", "bucket: example-aws-p5en-other")
    p5en.forget()
    refused = p5en.pulumi("up", "--yes")
    assert refused.returncode != 0
    assert "bucket:Bucket::aws-p5en-models" in refused.stdout.split("unable to replace resource", 1)[1]
    assert p5en.acts() == []
    p5en.edit("bucket: example-aws-p5en-other", "bucket: example-aws-p5en-models")


def test_a_pool_grows_and_shrinks_by_just_those_nodes(p5en: EmulatedFleet):
    p5en.resize("large", 6)
    assert p5en.up() == [("create", "aws-p5en-large-4"), ("create", "aws-p5en-large-5")]
    p5en.resize("large", 3)
    p5en.forget()
    refused = p5en.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    told = re.search(r"AWS-PROTECTED: .*aws-p5en-large-3, .*`(pulumi state unprotect [^`]*)`", refused.stdout)
    assert told, refused.stdout
    assert p5en.acts() == []
    p5en.done(*shlex.split(told[1])[1:], "--yes")
    assert p5en.up() == [("delete", f"aws-p5en-large-{n}") for n in (3, 4, 5)]
    assert Readback(p5en).mismatches() == []


def test_a_fault_of_the_account_is_told_and_the_next_up_goes_on(p5en: EmulatedFleet):
    p5en.resize("large", 4)
    p5en.faults({"act": "create", "type": "instance:Instance", "code": "RequestLimitExceeded"})
    failed = p5en.pulumi("up", "--yes", "--skip-preview")
    assert failed.returncode != 0
    assert "RequestLimitExceeded" in failed.stdout
    assert p5en.up() == [("create", "aws-p5en-large-3")]


def test_a_machine_that_a_killed_up_had_made_is_taken_over_and_not_made_twice(p5en: EmulatedFleet):
    p5en.resize("large", 5)
    p5en.faults({"act": "created", "type": "instance:Instance", "seconds": 600})
    p5en.forget()
    assert p5en.killed_up(lambda: "aws-p5en-large-4" in p5en.instances())
    made = p5en.instances()["aws-p5en-large-4"]["InstanceId"]
    assert made not in {row["id"] for row in p5en.state()}
    p5en.done("cancel", "--yes")
    told = p5en.done("up", "--yes", "--skip-preview")
    assert f"AWS-TAKEN-OVER: aws-p5en-large-4 is there as {made}" in told
    assert p5en.instances()["aws-p5en-large-4"]["InstanceId"] == made
    assert [*astray(p5en), *Readback(p5en).mismatches()] == []


def test_what_somebody_else_took_away_or_changed_is_told_and_an_up_with_refresh_puts_it_back(p5en: EmulatedFleet):
    assert drift(p5en) == (0, [])
    ec2 = p5en.account.client("ec2")
    ec2.terminate_instances(InstanceIds=[p5en.instances()["aws-p5en-large-4"]["InstanceId"]])
    (clients,) = [row for row in p5en.state() if name_in(row["urn"]) == "aws-p5en-clients-group"]
    everybody = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    ec2.authorize_security_group_ingress(GroupId=clients["id"], IpPermissions=[everybody])
    before = p5en.state()
    code, found = drift(p5en)
    assert (code, sorted((row["rule"], row["name"], row["found"]) for row in found)) == (
        1,
        [
            ("DRIFT-CHANGED", "aws-p5en-clients-group", "another ingress than `pulumi up` left it with"),
            ("DRIFT-GONE", "aws-p5en-large-4", "it is in the state and not in the account"),
        ],
    )
    assert p5en.state() == before, "to look changes nothing"
    p5en.forget()
    p5en.done("up", "--refresh", "--yes", "--skip-preview")
    assert {("create", "aws-p5en-large-4"), ("update", "aws-p5en-clients-group")} <= set(p5en.acts())
    assert drift(p5en) == (0, [])
    assert [*astray(p5en), *Readback(p5en).mismatches()] == []


def drift(fleet: EmulatedFleet) -> tuple[int, list[dict[str, str]]]:
    """What `gpuyard drift --infrastructure` says of it."""
    words = ["gpuyard", "drift", "--stack", fleet.name, "--infrastructure", "--json"]
    asked = subprocess.run(words, cwd=fleet.project, env=fleet.environment, capture_output=True, text=True, check=False)
    assert asked.returncode in (0, 1), asked.stderr
    return asked.returncode, json.loads(asked.stdout)["infrastructure"]


def test_bad_input_is_refused_before_anything_is_created(p5en: EmulatedFleet):
    p5en.edit("zones: [us-east-1a]}", "zones: [us-east-1a], network_cards: 17}")
    p5en.forget()
    refused = p5en.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    assert "AWS-CARDS: pools[0].aws.network_cards: 17 cards with EFA" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert p5en.acts() == []
    p5en.edit(", network_cards: 17}", "}")


def test_what_the_account_says_is_refused_before_anything_is_created(p5en: EmulatedFleet):
    p5en.resize("large", 6)
    p5en.forget()
    p5en.account.keep_beside("quotas", "L-417A185B", 1000)
    refused = p5en.pulumi("up", "--yes", "--skip-preview")
    assert refused.returncode != 0
    assert "AWS-QUOTA: the account in us-east-1: 1000 vCPUs of `Running On-Demand P instances`" in refused.stdout
    assert "1152: 6 x p5en.48xlarge of 192; ask AWS for 1152 of quota L-417A185B" in refused.stdout
    p5en.account.keep_beside("quotas", "L-417A185B", None)
    assert "AWS-REGION: aws:region is us-west-2" in p5en.pulumi("preview", "-c", "aws:region=us-west-2").stdout
    p5en.done("config", "rm", "aws:region")
    assert p5en.acts() == []


def test_credentials_that_are_expired_are_told_before_anything_is_created(p5en: EmulatedFleet):
    p5en.faults({"act": "ask", "type": "getCallerIdentity", "code": "ExpiredToken"})
    refused = p5en.pulumi("preview")
    assert refused.returncode != 0
    assert "AWS-CREDENTIALS" in refused.stdout
    assert "sign in" in refused.stdout


def test_destroy_leaves_nothing(p5en: EmulatedFleet):
    p5en.give_up()
    p5en.done("destroy", "--yes", "--skip-preview")
    assert p5en.state() == []
    assert p5en.left() == []
