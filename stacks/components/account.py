"""Asks the account what `gpuyard.provision.account` wants to know, with the SDK's own look-ups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pulumi
import pulumi_aws as aws

from gpuyard.provision.account import Answers, Endpoint, Image, MachineType, Questions, Subnet
from gpuyard.spec.errors import RefusedError

_NO_CREDENTIALS = re.compile(
    r"credential|ExpiredToken|InvalidClientTokenId|UnrecognizedClient|AuthFailure|SSO session|security token", re.I
)


def answers(asked: Questions, provider: aws.Provider) -> Answers:
    """RefusedError where the account does not let us in."""
    opts = pulumi.InvokeOptions(provider=provider)
    if asked != Questions(None, (), (), ()):
        _let_in(opts)
    return Answers(
        image=or_none(lambda: _image(asked.image or "", opts)) if asked.image else None,
        types={name: found for name in asked.types if (found := or_none(lambda name=name: _type(name, opts)))},
        subnets={name: found for name in asked.subnets if (found := or_none(lambda name=name: _subnet(name, opts)))},
        quotas={code: value for code in asked.quotas if (value := _quota(code, opts)) is not None},
        s3=or_none(lambda: _endpoint(asked.s3, opts)) if asked.s3 else None,
    )


def _let_in(opts: pulumi.InvokeOptions) -> None:
    try:
        aws.get_caller_identity(opts=opts)
    except Exception as error:
        # The SDK raises plain Exception.
        if not _NO_CREDENTIALS.search(str(error)):
            raise
        change = "sign in (`aws sso login`, `aws configure`, or the variables AWS_...) and run it again"
        raise RefusedError("AWS-CREDENTIALS", str(error).strip(), "AWS let nobody in", change) from error


def _image(name: str, opts: pulumi.InvokeOptions) -> Image:
    found = aws.ec2.get_ami(filters=[{"name": "image-id", "values": [name]}], include_deprecated=True, opts=opts)
    return Image(found.architecture, found.root_device_name)


def _type(name: str, opts: pulumi.InvokeOptions) -> MachineType | None:
    only = [{"name": "instance-type", "values": [name]}]
    zones = aws.ec2.get_instance_type_offerings(filters=only, location_type="availability-zone", opts=opts).locations
    if not zones:
        return None
    found = aws.ec2.get_instance_type(instance_type=name, opts=opts)
    return MachineType(int(found.default_vcpus), tuple(found.supported_architectures), frozenset(zones))


def _subnet(name: str, opts: pulumi.InvokeOptions) -> Subnet:
    found = aws.ec2.get_subnet(id=name, opts=opts)
    return Subnet(found.availability_zone, found.vpc_id, int(found.available_ip_address_count))


def _quota(code: str, opts: pulumi.InvokeOptions) -> float | None:
    """None where the account does not say: what it then refuses, it refuses machine by machine."""
    try:
        return aws.servicequotas.get_service_quota(service_code="ec2", quota_code=code, opts=opts).value
    except Exception as error:
        if not re.search(r"NoSuchResource|AccessDenied|not authorized|no matching", str(error)):
            raise
        pulumi.log.warn(f"AWS-QUOTA: {code} is not held against the fleet, since nobody tells it: {str(error).strip()}")
        return None


def _endpoint(asked: Mapping[str, str], opts: pulumi.InvokeOptions) -> Endpoint | None:
    try:
        found = aws.ec2.get_vpc_endpoint(**asked, state="available", opts=opts)
    except Exception as error:
        # It tells of one alone, so of several it is not known which one nodes take: any will do.
        if "multiple" not in str(error) or "id" in asked:
            raise
        return Endpoint(asked["vpc_id"], asked["service_name"], None)
    tables = frozenset(found.route_table_ids) if found.vpc_endpoint_type == "Gateway" else None
    return Endpoint(found.vpc_id, found.service_name, tables)


def or_none(ask: Callable[[], Any]) -> Any:
    """The answer, None where AWS says that there is none."""
    try:
        return ask()
    except Exception as error:
        # Each service has its own word for it.
        if re.search(r"NoSuchEntity|NotFound|not found|no results|no matching|couldn't find", str(error)):
            return None
        raise
