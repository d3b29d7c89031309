"""The emulation says what it does not know: nothing is made, read or answered that is in no table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pulumi.runtime.proto import provider_pb2

from tests.emulated_aws.account import Account
from tests.emulated_aws.provider import Provider, struct


class ToldError(Exception):
    pass


class Context:
    def abort(self, code: Any, why: str) -> None:
        raise ToldError(why)


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    return Provider(Account("http://127.0.0.1:9", tmp_path))


def urn(kind: str) -> str:
    return f"urn:pulumi:test::gpuyard::{kind}::x"


def test_a_type_that_it_does_not_know_is_an_error(provider: Provider) -> None:
    with pytest.raises(ToldError, match="the emulated AWS has no aws:sqs/queue:Queue"):
        provider.Check(provider_pb2.CheckRequest(urn=urn("aws:sqs/queue:Queue")), Context())


def test_an_input_that_it_does_not_know_is_an_error(provider: Provider) -> None:
    news = {"cidrBlock": "10.0.0.0/16", "enableDnsHostnames": True}
    kind = urn("gpuyard:aws:Part$aws:ec2/vpc:Vpc")
    known = provider.Check(provider_pb2.CheckRequest(urn=kind, news=struct(news)), Context())
    assert dict(known.inputs) == news
    with pytest.raises(ToldError, match="does not know enableDnsSupport of aws:ec2/vpc:Vpc"):
        asked = provider_pb2.CheckRequest(urn=kind, news=struct({**news, "enableDnsSupport": False}))
        provider.Check(asked, Context())


def test_a_question_or_an_argument_that_it_does_not_know_is_an_error(provider: Provider) -> None:
    with pytest.raises(ToldError, match="the emulated AWS has no aws:ec2/getVpcs:getVpcs"):
        provider.Invoke(provider_pb2.InvokeRequest(tok="aws:ec2/getVpcs:getVpcs"), Context())
    tok = "aws:ec2/getSubnet:getSubnet"
    with pytest.raises(ToldError, match=f"does not know cidrBlock of {tok}"):
        asked = {"id": "subnet-1", "cidrBlock": "10.0.0.0/16"}
        provider.Invoke(provider_pb2.InvokeRequest(tok=tok, args=struct(asked)), Context())
