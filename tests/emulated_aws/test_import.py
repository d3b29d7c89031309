"""A file system that was there before becomes the fleet's own: the real engine, as docs/aws.md says it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuyard.provision import name_in
from tests.emulated_aws.fleet import EmulatedFleet, emulated_fleet, moto_server

pytestmark = pytest.mark.engine
TYPE = "aws:efs/fileSystem:FileSystem"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedFleet]:
    folder = tmp_path_factory.mktemp("import")
    with moto_server(folder / "moto") as endpoint:
        yield emulated_fleet(folder, "aws-p5en", endpoint)


def test_a_file_system_that_was_there_is_neither_made_again_nor_replaced(fleet: EmulatedFleet):
    fleet.up()
    efs = fleet.account.client("efs")
    asked = {"Encrypted": True, "ThroughputMode": "elastic", "Tags": [{"Key": "Name", "Value": "models"}]}
    theirs = efs.create_file_system(CreationToken="theirs", **asked)["FileSystemId"]
    urns = {name_in(row["urn"]): row["urn"] for row in fleet.exported()["resources"]}
    part, provider = urns["aws-p5en-storage"], urns["aws-p5en-aws"]
    urn = part.replace("$gpuyard:aws:Part::aws-p5en-storage", f"$gpuyard:aws:Part${TYPE}::aws-p5en-efs")
    # The emulated account tells of a resource what was asked for by its URN, and its provider has no schema.
    fleet.account.asked(urn, {"encrypted": True, "throughputMode": "elastic", "tags": {"Name": "models"}})
    words = ["--parent", f"part={part}", "--provider", f"aws={provider}", "--generate-code=false", "--yes"]
    fleet.done("import", TYPE, "aws-p5en-efs", theirs, *words, "--properties", "encrypted,throughputMode,tags")
    assert {row["urn"]: row["id"] for row in fleet.state()}[urn] == theirs

    fleet.edit("  lustre:", "  efs: true\n  lustre:")
    acts = fleet.up()
    assert [act for act, name in acts if name == "aws-p5en-efs"] == ["update"], "it gets the fleet's tags, nothing else"
    assert {act for act, _ in acts} == {"create", "update"}
    assert [each["FileSystemId"] for each in efs.describe_file_systems()["FileSystems"]] == [theirs]
    targets = efs.describe_mount_targets(FileSystemId=theirs)["MountTargets"]
    assert len({each["SubnetId"] for each in targets}) == len(targets) == 2
    assert fleet.up() == []
    (row,) = [row for row in fleet.state() if row["urn"] == urn]
    assert row["protect"], "as what was made here"
