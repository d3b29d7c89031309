"""AWS: what `gpuyard.provision.aws` decides for a fleet, made with the official SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pulumi
import pulumi_aws as aws

from gpuyard.catalog import load_quotas, load_repositories
from gpuyard.handover.aws import Made, handover_of
from gpuyard.plan.names import repository
from gpuyard.provision import Wanted, name_in
from gpuyard.provision.account import findings, questions, to_make
from gpuyard.provision.apart import REFUSALS, close_pools_apart, standing
from gpuyard.provision.aws import instance_of, next_zone, wanted
from gpuyard.provision.interrupted import begun
from gpuyard.provision.placement import Refusal, refused_for_capacity
from gpuyard.provision.protection import given_up
from gpuyard.provision.refusals import Machines, refusals
from gpuyard.spec.closed import digest_of
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.fleet import Fleet
from stacks.components.account import answers
from stacks.components.aws import Maker, class_of
from stacks.components.interrupted import Finder
from stacks.components.state import State


class AwsFleet(pulumi.ComponentResource):
    """A whole fleet on AWS."""

    handover: pulumi.Output[dict[str, Any]]
    """`gpuyard.handover.Handover` as plain data."""

    def __init__(self, fleet: Fleet, *, project: Path, stack: str, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("gpuyard:aws:Fleet", fleet.name, None, opts)
        kept = State()
        machines = Machines.known()
        for finding in refusals(fleet, machines):
            raise finding.refusal()
        assert fleet.aws is not None  # noqa: S101 - AWS-SETTINGS
        key = signing_key(project, fleet.aws.nvidia_repository.key_file)
        record = project / REFUSALS / f"{stack}.jsonl"
        items = wanted(fleet, machines, read_refusals(record))
        region_of_the_stack(fleet.aws.region)
        provider = aws.Provider(f"{fleet.name}-aws", region=fleet.aws.region, opts=pulumi.ResourceOptions(parent=self))
        # The parts of the SDK take as long to be imported as the engine takes to tell its state.
        for kind in {item.kind for item in items}:
            class_of(kind)
        state = kept.deployment()
        for finding in given_up(items, fleet.name, stack, state):
            raise finding.refusal()
        zones = {item.name: item.zone for item in items if item.zone}
        for finding in close_pools_apart(fleet, stack, standing(state), zones):
            raise finding.refusal()
        new = to_make(items, fleet.name, frozenset(name_in(row["urn"]) for row in state.get("resources") or ()))
        told = answers(questions(fleet, new, load_quotas()), provider)
        for finding in findings(fleet, items, new, told, load_quotas()):
            raise finding.refusal()
        hooks = pulumi.ResourceHookBinding(on_error=[pulumi.ErrorHook("capacity", remember(fleet, items, record))])
        there = Finder(fleet.name, provider).ids(begun(items, fleet.name, state))
        for name, its in there.items():
            pulumi.log.warn(
                f"AWS-TAKEN-OVER: {name} is there as {its}, from an `up` that was killed; it is gone on with"
            )
        opts = pulumi.ResourceOptions(parent=self, provider=provider)
        made = Maker(fleet.name, opts, hooks, there).make(items)
        nodes = {
            item.name: pulumi.Output.all(
                id=made[item.name].id,
                address=made[item.name].private_ip,
                zone=made[item.name].availability_zone,
                type=made[item.name].instance_type,
            )
            for item in items
            if item.kind == "ec2.Instance"
        }
        fingerprint = repository(load_repositories(), "aws").key_fingerprint
        told = {"endpoint": made["balancer"].dns_name, "nodes": pulumi.Output.all(**nodes)}
        if fleet.aws.lustre:
            told["lustre"] = pulumi.Output.all(dns_name=made["lustre"].dns_name, mount_name=made["lustre"].mount_name)
        if fleet.aws.efs:
            told["efs"] = pulumi.Output.all(dns_name=made["efs"].dns_name)
        digest = digest_of(plain(items))

        def handed_over(found: dict[str, Any]) -> dict[str, Any]:
            try:
                return handover_of(fleet, stack, digest, key, fingerprint, Made(**found)).model_dump(mode="json")
            except RefusedError as refused:
                # Also a machine that was taken over may stand in another zone; the engine shows this without a trace.
                raise pulumi.RunError(str(refused)) from refused

        self.handover = pulumi.Output.all(**told).apply(handed_over)
        self.register_outputs({"handover": self.handover})


def plain(items: Sequence[Wanted]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]


def region_of_the_stack(region: str) -> None:
    """The fleet's region is what counts; a stack that says another one is a stack of something else."""
    said = pulumi.Config("aws").get("region")
    if said and said != region:
        change = f"`pulumi config rm aws:region`, or set aws.region to {said}"
        raise RefusedError("AWS-REGION", f"aws:region is {said}", f"the fleet stands in {region}", change)


def signing_key(project: Path, name: str) -> str:
    path = project / name
    if not path.is_file():
        change = "put the public key of the repository there, and compare its fingerprint with the vendor's page"
        raise RefusedError("AWS-KEY-FILE", f"no file {name}", "nodes verify packages with it", change)
    return path.read_text()


def read_refusals(path: Path) -> list[Refusal]:
    """What zones refused until now, the oldest first."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Refusal.model_validate_json(line) for line in lines]


def remember(fleet: Fleet, items: Sequence[Wanted], record: Path) -> pulumi.ErrorHookFunction:
    """A hook that writes down that a zone had no machine, so that the next `up` tries another one."""
    pools = {pool.name: pool for pool in fleet.pools}
    asked = {item.name: (pools[item.part], item.zone) for item in items if item.zone and item.part in pools}

    def hook(failed: pulumi.ErrorHookArgs) -> bool:
        said = " ".join(failed.errors[:1])
        if failed.failed_operation == "create" and failed.name in asked and refused_for_capacity(said):
            pool, zone = asked[failed.name]
            at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            row = Refusal(at=at, node=failed.name, instance=instance_of(pool), zone=zone or "", said=said[:500])
            record.parent.mkdir(parents=True, exist_ok=True)
            # One write each: hooks run side by side.
            with record.open("ab", buffering=0) as file:
                file.write(f"{row.model_dump_json()}\n".encode())
            then = next_zone(pool, fleet, read_refusals(record))
            pulumi.log.warn(
                f"AWS-CAPACITY: {zone} has no {row.instance} for {failed.name}; the next `pulumi up` tries {then}"
            )
        return False

    return hook
