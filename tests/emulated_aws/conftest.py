"""One emulated account for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server


@pytest.fixture(scope="session")
def account_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where moto's server listens."""
    with moto_server(tmp_path_factory.mktemp("moto")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def p5en(tmp_path_factory: pytest.TempPathFactory, account_at: str) -> EmulatedFleet:
    """Four machines with EFA, brought up. The tests of the file change it in their order."""
    assert shutil.which("pulumi"), "no pulumi on PATH; run `. ./activate` first"
    fleet = emulated_fleet(tmp_path_factory.mktemp("aws"), "aws-p5en", account_at)
    fleet.done("up", "--yes", "--skip-preview")
    return fleet
