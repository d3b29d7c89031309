"""Where a fleet's models and shared files lie on AWS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from gpuyard.provision import Json, Ref, Wanted
from gpuyard.spec.aws import Aws


def storage(aws: Aws, subnets: Mapping[str, Ref | str]) -> Iterator[Wanted]:
    """The bucket of models, which S3 encrypts by itself, and the file systems that are asked for."""

    def item(
        kind: str, name: str, inputs: dict[str, Any], after: tuple[str, ...] = (), keeps: tuple[str, ...] = ()
    ) -> Wanted:
        return Wanted(kind, name, inputs, "storage", after=after, keeps=keeps)

    yield item("s3.Bucket", "models", {"bucket": aws.bucket})
    shut = dict.fromkeys(
        ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets"), True
    )
    yield item("s3.BucketPublicAccessBlock", "models-shut", {"bucket": Ref("models"), **shut})
    objects = f"arn:aws:s3:::{aws.bucket}/*"
    source, which = reads_through(aws)
    from_here = {
        "Sid": "NodesReadThroughTheEndpoint" if source == "aws:SourceVpce" else "NodesReadFromTheirVpc",
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": objects,
        "Condition": {"StringEquals": {source: which}},
    }
    only_tls = {
        "Sid": "NothingInTheClear",
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:aws:s3:::{aws.bucket}", objects],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
    policy = {"bucket": Ref("models"), "policy": Json({"Version": "2012-10-17", "Statement": [from_here, only_tls]})}
    yield item("s3.BucketPolicy", "models-policy", policy, after=("models-shut",))
    if aws.lustre:
        groups = [Ref("storage-group"), *([Ref("fabric-group")] if aws.lustre.efa else [])]
        lustre: dict[str, Any] = {
            "deployment_type": "PERSISTENT_2",
            "storage_type": "SSD",
            "storage_capacity": round(aws.lustre.tib * 1000),
            "per_unit_storage_throughput": aws.lustre.mb_s_per_tib,
            "subnet_ids": subnets[aws.lustre.zone],
            "security_group_ids": groups,
            "efa_enabled": aws.lustre.efa,
            "data_compression_type": "NONE",
            "file_system_type_version": "2.15",
        }
        if aws.lustre.efa:
            lustre["metadata_configuration"] = {"mode": "AUTOMATIC"}
        # FSx does not tell the groups of a file system: one that was taken over would be made anew for them.
        yield item("fsx.LustreFileSystem", "lustre", lustre, keeps=("security_group_ids",))
    if aws.efs:
        yield item("efs.FileSystem", "efs", {"encrypted": True, "throughput_mode": "elastic"})
        for zone, subnet in subnets.items():
            inputs = {"file_system_id": Ref("efs"), "subnet_id": subnet, "security_groups": [Ref("storage-group")]}
            yield item("efs.MountTarget", f"efs-{zone}", inputs)


def reads_through(aws: Aws) -> tuple[str, Ref | str]:
    """Key and value of the condition under which S3 lets a node read.

    Nodes ask without a name. S3 knows the VPC of who asks where the way leads through an endpoint, whichever it is.
    """
    if aws.network.makes("s3"):
        return "aws:SourceVpce", Ref("s3-endpoint")
    if aws.network.s3_endpoint:
        return "aws:SourceVpce", aws.network.s3_endpoint
    return "aws:SourceVpc", aws.network.vpc or ""


def lustre_addresses(tib: float) -> int:
    """Addresses that a Lustre file system takes: one for each 1.2 TiB, and those of its metadata; from memory."""
    return ceil(tib / 1.2) + 2
