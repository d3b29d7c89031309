"""The account read back with boto3 and held against the spec, the catalog and EC2's own table of its machines.

moto answers `describe_instance_types` with what EC2 publishes: cards, EFA, GPUs, disks. Neither the catalog's rows nor
`gpuyard.provision` are asked what a machine has; a fleet that was decided by a wrong row shows here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from gpuyard.catalog import load_instances
from gpuyard.spec.fleet import Fleet, Pool
from tests.emulated_aws.fleet import EmulatedFleet
from tests.emulated_aws.looks import tagged
from tests.emulated_aws.tables import KINDS

Json = dict[str, Any]


class Readback:
    """One look at the account. `cards` and `machines` count what was compared."""

    def __init__(self, fleet: EmulatedFleet) -> None:
        self.fleet = fleet
        self.spec: Fleet = fleet.spec()
        self.ec2 = fleet.account.client("ec2")
        self.cards = 0
        self.machines = 0
        self.type_of = cache(self._type_of)

    def mismatches(self) -> list[str]:
        """What is there and should not be, or the other way round, or otherwise than asked for."""
        there = self.fleet.instances()
        gateways = [f"{self.spec.name}-gateway-{n}" for n in range(self.spec.gateway.nodes)]
        pools = {
            pool.name: [f"{self.spec.name}-{pool.name}-{n}" for n in range(pool.nodes)] for pool in self.spec.pools
        }
        expected = {*gateways, *(name for names in pools.values() for name in names)}
        found = [f"{name} is not there" for name in sorted(expected - set(there))]
        found += [f"{name} is there and nobody asked for it" for name in sorted(set(there) - expected)]
        self.machines = len(expected & set(there))
        for pool in self.spec.pools:
            standing = {name: there[name] for name in pools[pool.name] if name in there}
            found += [f"{name}: {what}" for name, one in standing.items() for what in self._machine(pool, name, one)]
            found += self._together(pool, standing)
        found += self._gateways({name: there[name] for name in gateways if name in there})
        return [*found, *self._network(), *self._storage()]

    def _type_of(self, name: str) -> Json:
        """EC2's row of a type of machine."""
        return self.ec2.describe_instance_types(InstanceTypes=[name])["InstanceTypes"][0]

    # --- machines ------------------------------------------------------------------------------------------------

    def _machine(self, pool: Pool, name: str, one: Json) -> Iterator[str]:
        asked = pool.machine.instance if pool.machine else None
        if one["InstanceType"] != asked:
            yield f"it is a {one['InstanceType']}, and {asked} was asked for"
        kind = self.type_of(one["InstanceType"])
        gpus = sum(each["Count"] for each in kind["GpuInfo"]["Gpus"])
        if gpus != pool.gpus_per_node:
            yield f"{one['InstanceType']} has {gpus} GPUs, and the pool says {pool.gpus_per_node}"
        yield from self._disks(one["InstanceType"], kind)
        zone, aws = one["Placement"]["AvailabilityZone"], self.spec.aws
        zones = (pool.aws and pool.aws.zones) or (aws.zones if aws else ())
        if zone not in zones:
            yield f"it stands in {zone}, and {', '.join(zones)} was asked for"
        data = self.fleet.template(f"{self.spec.name}-{pool.name}-{zone}")
        yield from self._template(data, one)
        yield from self._interfaces(pool, kind, data["NetworkInterfaces"])
        market = data.get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        bought = (pool.machine and pool.machine.purchase) or "on-demand"
        if market != bought:
            yield f"it is bought as {market}, and {bought} was asked for"

    def _disks(self, name: str, kind: Json) -> Iterator[str]:
        """The NVMe disks that the catalog counts on: a RAID is made of them later."""
        row = next(row for row in load_instances() if (row.provider, row.instance) == ("aws", name))
        there = [(each["Count"], each["SizeInGB"]) for each in kind.get("InstanceStorageInfo", {}).get("Disks", [])]
        counted = [(row.nvme["drives"], row.nvme["gb_each"])] if row.nvme else []
        if there != counted:
            yield f"{name} has the disks {there}, and the catalog counts on {counted}"

    def _template(self, data: Json, one: Json) -> Iterator[str]:
        aws = self.spec.aws
        if data["InstanceType"] != one["InstanceType"]:
            yield f"its template is of a {data['InstanceType']}"
        if aws and data["ImageId"] != aws.image.id:
            yield f"its template has image {data['ImageId']}, and {aws.image.id} was asked for"
        if data["MetadataOptions"]["HttpTokens"] != "required":
            yield "IMDSv1 is open"
        if [disk["Ebs"]["Encrypted"] for disk in data["BlockDeviceMappings"]] != [True]:
            yield "its volume is not encrypted"
        cards = data["NetworkInterfaces"]
        if any(card.get("AssociatePublicIpAddress") for card in cards):
            yield "it has a public address"

    def _interfaces(self, pool: Pool, kind: Json, interfaces: list[Json]) -> Iterator[str]:
        """Card by card: one interface with the address, and one EFA-only on each card that takes EFA."""
        cards = kind["NetworkInfo"]["NetworkCards"]
        asked = pool.aws.network_cards if pool.aws else None
        efa = [card["NetworkCardIndex"] for card in cards if "efa-only" in card.get("InterfaceTypes", [])]
        wanted = set(efa[: asked or len(efa)]) if pool.efa is not None else set[int]()
        most = kind["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
        if len(wanted) > most:
            yield f"{len(wanted)} EFA interfaces, and the type has at most {most}"
        unknown = {each["NetworkCardIndex"] for each in interfaces} - {card["NetworkCardIndex"] for card in cards}
        if unknown:
            yield f"interfaces on cards {sorted(unknown)}, which the type does not have"
        for card in cards:
            self.cards += 1
            index = card["NetworkCardIndex"]
            here = [each for each in interfaces if each["NetworkCardIndex"] == index]
            devices = sorted((each["DeviceIndex"], each.get("InterfaceType", "interface")) for each in here)
            expected = [(0, "interface")] if index == 0 else []
            if index in wanted:
                # The primary interface cannot be EFA-only: beside it EFA has the second device.
                expected.append((1 if index == 0 else 0, "efa-only"))
            if devices != expected:
                yield f"card {index} has {devices or 'nothing'}, and {expected or 'nothing'} was expected"
            if len(here) > card["MaximumNetworkInterfaces"]:
                yield f"card {index} takes {card['MaximumNetworkInterfaces']} interfaces, and {len(here)} are asked for"

    def _together(self, pool: Pool, standing: dict[str, Json]) -> Iterator[str]:
        zones = {one["Placement"]["AvailabilityZone"] for one in standing.values()}
        close = (pool.aws and pool.aws.placement_group) or pool.efa is not None
        if not close or (pool.machine and pool.machine.purchase == "capacity-block"):
            return
        if len(zones) > 1:
            yield f"pool {pool.name} is spread over {', '.join(sorted(zones))}, and EFA stays inside one zone"
        for zone in zones:
            group = self.fleet.template(f"{self.spec.name}-{pool.name}-{zone}")["Placement"].get("GroupName", "")
            # moto has no placement groups: they are kept beside it.
            if self.fleet.account.beside("placement").get(group, {}).get("strategy") != "cluster":
                yield f"pool {pool.name} stands in no cluster placement group in {zone}"

    # --- what stands around them -------------------------------------------------------------------------------------

    def _gateways(self, gateways: dict[str, Json]) -> Iterator[str]:
        zones = {one["Placement"]["AvailabilityZone"] for one in gateways.values()}
        if len(gateways) > 1 and len(zones) < 2:
            yield f"all gateways stand in {', '.join(zones)}"
        elb = self.fleet.account.client("elbv2")
        groups = elb.describe_target_groups()["TargetGroups"]
        health = [elb.describe_target_health(TargetGroupArn=group["TargetGroupArn"]) for group in groups]
        behind = {each["Target"]["Id"] for one in health for each in one["TargetHealthDescriptions"]}
        if behind != {one["InstanceId"] for one in gateways.values()}:
            yield "the load balancer does not lead to the gateways"

    def _network(self) -> Iterator[str]:
        aws = self.spec.aws
        inward = [
            (rule["FromPort"], rule["ToPort"], each["CidrIp"])
            for group in self.ec2.describe_security_groups()["SecurityGroups"]
            for rule in group["IpPermissions"]
            for each in rule["IpRanges"]
        ]
        port = self.spec.gateway.port
        open_to = [(port, port, cidr) for cidr in (aws.network.clients if aws else ())]
        if sorted(inward) != sorted(open_to):
            yield f"from outside {inward} is open, and {open_to} was asked for"

    def _storage(self) -> Iterator[str]:
        aws, account = self.spec.aws, self.fleet.account
        assert aws is not None
        found = account.client("fsx").describe_file_systems()["FileSystems"]
        sizes = [each["StorageCapacity"] for each in found]
        if sizes != ([round(aws.lustre.tib * 1000)] if aws.lustre else []):
            yield f"Lustre of {sizes} GiB is there"
        if aws.lustre and found:
            subnet = self.ec2.describe_subnets(SubnetIds=found[0]["SubnetIds"])["Subnets"][0]
            if subnet["AvailabilityZone"] != aws.lustre.zone:
                yield f"Lustre stands in {subnet['AvailabilityZone']}"
        if len(account.client("efs").describe_file_systems()["FileSystems"]) != int(aws.efs):
            yield "EFS is not as asked for"
        s3 = account.client("s3")
        if [each["Name"] for each in s3.list_buckets()["Buckets"]] != [aws.bucket]:
            yield "the bucket of the models is not there, or not alone"
        elif not all(s3.get_public_access_block(Bucket=aws.bucket)["PublicAccessBlockConfiguration"].values()):
            yield "the bucket of the models is not shut"


def astray(fleet: EmulatedFleet) -> list[str]:
    """What is in the account and not in the state, there twice, or in the state and not in the account."""
    state, account = fleet.state(), fleet.account
    ids = {row["id"] for row in state if row.get("custom")}
    things = [
        (arn, tags) for arn, tags in tagged(account, gone=False).items() if tags.get("gpuyard:fleet") == fleet.name
    ]
    keys = {row["KeyPairId"]: row["KeyName"] for row in account.client("ec2").describe_key_pairs()["KeyPairs"]}
    found: list[str] = []
    for arn, _ in things:
        end = re.split(r"[/:]", arn)[-1]
        if not {arn, end, keys.get(end, "")} & ids:
            found.append(f"{arn} is in no state")
    called = Counter((arn.split("/")[0], tags["Name"]) for arn, tags in things)
    found += [f"{kind} {name} is there {count} times" for (kind, name), count in called.items() if count > 1]
    iam, efs = account.client("iam"), account.client("efs")
    others = {each["Name"] for each in account.client("s3").list_buckets()["Buckets"]}
    others |= {each["RoleName"] for each in iam.list_roles()["Roles"]}
    others |= {each["InstanceProfileName"] for each in iam.list_instance_profiles()["InstanceProfiles"]}
    for files in efs.describe_file_systems()["FileSystems"]:
        targets = efs.describe_mount_targets(FileSystemId=files["FileSystemId"])["MountTargets"]
        others |= {each["MountTargetId"] for each in targets}
    found += [f"{name} is in no state" for name in sorted(others - ids)]
    lost = [row for row in state if row.get("custom") and not KINDS[row["type"]].is_there(account, row["id"])]
    return [*found, *(f"{row['urn']} is in the state and not in the account" for row in lost)]
