"""`gpuyard init`: a fleet begun from one of the project's is whole, and says what in it is not one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gpuyard.cli import app
from gpuyard.handover.hosts import hosts_path, load_hosts
from gpuyard.spec.begin import renamed
from gpuyard.spec.loader import load_fleet

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(PROJECT / "Pulumi.yaml", tmp_path)
    for part in ("fleets", "inventories"):
        shutil.copytree(PROJECT / part, tmp_path / part, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(*words: str) -> Result:
    return CliRunner().invoke(app, ["init", *words])


def told(*words: str) -> dict[str, Any]:
    done = asked(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("words", "provider"),
    [
        (["--provider", "aws"], "aws"),
        (["--provider", "hosts"], "hosts"),
        (["--provider", "lab"], "lab"),
        ([], "lab"),
        (["--provider", "aws", "--from", "aws-mixed"], "aws"),
        (["--from", "fleets/aws-p5en.yaml"], "aws"),
    ],
)
def test_a_fleet_is_begun_whole_and_every_file_of_it_has_its_name(
    project: Path, words: list[str], provider: str
) -> None:
    said = told("mine", *words)
    fleet = load_fleet(project / "fleets/mine.yaml")
    assert (fleet.name, fleet.provider, said["provider"]) == ("mine", provider, provider)
    if provider == "hosts":
        hosts = load_hosts(hosts_path(project / "fleets/mine.yaml"), fleet)
        assert (hosts.fleet, {node.name.split("-")[0] for node in hosts.nodes}) == ("mine", {"mine"})
    inventory = project / "inventories/mine"
    assert "mine\n" in (inventory / "fleet.pulumi.yml").read_text()
    assert (inventory / "group_vars/all/secrets.yml").is_file(), "a link that leads nowhere"
    assert said["files"] == [str(path.relative_to(project)) for path in made(project)]
    assert said["next"][0] == "gpuyard check fleets/mine.yaml"


def made(project: Path) -> list[Path]:
    found = [path for part in ("fleets", "inventories") for path in (project / part).glob("mine*")]
    return sorted(found, key=lambda path: ("hosts" in path.name) + 2 * (path.parent.name == "inventories"))


def test_nothing_is_written_to_look_and_nothing_is_written_over(project: Path) -> None:
    said = told("mine", "--provider", "hosts", "--check")
    assert not said["written"]
    assert made(project) == []
    (project / "inventories/mine").mkdir()
    refused = asked("mine", "--provider", "hosts")
    assert refused.exit_code == 3
    assert "INIT-EXISTS: inventories/mine: it is there already" in refused.stderr
    assert not (project / "fleets/mine.yaml").exists()


def test_what_is_not_ones_own_is_told_by_its_line(project: Path) -> None:
    said = told("mine", "--provider", "aws")
    lines = (project / "fleets/mine.yaml").read_text().splitlines()
    rows: list[dict[str, Any]] = said["examples"]
    assert [row["text"] for row in rows] == [lines[row["line"] - 1].strip() for row in rows]
    words = " ".join(row["text"] for row in rows)
    for expected in ("ami-0123456789abcdef0", "198.51.100.0/24", "public_key", "example-mine-models", "@example.com"):
        assert expected in words


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["mine", "--from", "nothing"], 3, "INIT-FROM: --from nothing: there is no such fleet; name a spec's path, or"),
        (["mine", "--provider", "aws", "--from", "lab"], 3, "INIT-PROVIDER: "),
        (["Mine_", "--provider", "aws"], 1, "fleets/Mine_.yaml:5: SPEC-VALUE: name: given 'Mine_'"),
    ],
)
def test_what_cannot_be_begun_is_refused_and_leaves_nothing(
    project: Path, words: list[str], code: int, expected: str
) -> None:
    refused = asked(*words)
    assert refused.exit_code == code
    assert expected in refused.stderr
    assert made(project) == []


def test_a_word_that_only_reads_like_the_name_stays() -> None:
    text = "name: prod\nprovider: prod\ntags: {env: prod, team: product}\nbucket: x-prod-models\n# fleets/prod.yaml\n"
    assert renamed(text, "prod", "new") == (
        "name: new\nprovider: prod\ntags: {env: prod, team: product}\nbucket: x-new-models\n# fleets/new.yaml\n"
    )
