"""Emulated accounts for the tests of this folder, one for each fleet."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from tests.emulated_aws.account import Account
from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server
from tools.aws_previews import normalised

BroughtUp = Callable[[str], tuple[EmulatedFleet, str]]
"""A fleet in an account of its own, and what `pulumi preview` said before there was anything."""


@pytest.fixture(scope="session")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BroughtUp]:
    """Brings each fleet up once."""
    assert shutil.which("pulumi"), "no pulumi on PATH; run `. ./activate` first"
    with ExitStack() as servers:

        @cache
        def bring(name: str) -> tuple[EmulatedFleet, str]:
            endpoint = servers.enter_context(moto_server(tmp_path_factory.mktemp(f"{name}-moto")))
            fleet = emulated_fleet(tmp_path_factory.mktemp(name), name, endpoint)
            preview = normalised(fleet.planned())
            fleet.up()
            return fleet, preview

        yield bring


@pytest.fixture(scope="session")
def p5en(brought_up: BroughtUp) -> EmulatedFleet:
    """Four machines with EFA. The tests of test_engine.py change it in their order."""
    return brought_up("aws-p5en")[0]


@pytest.fixture(scope="session")
def state_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a backend in a bucket, which is in an account of its own."""
    with moto_server(tmp_path_factory.mktemp("state-moto")) as endpoint:
        Account(endpoint, tmp_path_factory.mktemp("state")).client("s3").create_bucket(Bucket="gpuyard-state")
        host = endpoint.removeprefix("http://")
        yield f"s3://gpuyard-state?region=us-east-1&endpoint={host}&disableSSL=true&s3ForcePathStyle=true"
