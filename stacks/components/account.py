"""Asks the account what `gpuyard.provision.account` wants to know, with the SDK's own look-ups."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pulumi
import pulumi_aws as aws

from gpuyard.provision.account import Answers, Image, MachineType, Questions, Subnet
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
        quotas={
            code: aws.servicequotas.get_service_quota(service_code="ec2", quota_code=code, opts=opts).value
            for code in asked.quotas
        },
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


def or_none(ask: Callable[[], Any]) -> Any:
    """The answer, None where AWS says that there is none."""
    try:
        return ask()
    except Exception as error:
        # Each service has its own word for it.
        if re.search(r"NoSuchEntity|NotFound|not found|no results|couldn't find", str(error)):
            return None
        raise
