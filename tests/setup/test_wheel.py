"""The wheel alone, in an environment of its own: no clone, no configuration, no collections path."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from steps import ground

from tests.serving.conftest import MODEL_FILES, Store

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (PROJECT / "roles").iterdir())
PLAYBOOKS = sorted(
    "gpuyard.fleet." + ".".join(path.relative_to(PROJECT / "playbooks").with_suffix("").parts)
    for path in (PROJECT / "playbooks").rglob("*.yml")
    if "tasks" not in path.parts
)


@dataclass
class Installed:
    """A user's machine after the wheel was installed, and an empty folder that the user stands in."""

    wheel: Path
    venv: Path
    home: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{self.venv}/bin:/usr/bin:/bin", "HOME": str(self.home), "COLUMNS": "200", "LC_ALL": "C.UTF-8"}
        env["PWD"] = str(self.home)
        return subprocess.run(command, cwd=self.home, env=env, capture_output=True, text=True, check=False, timeout=120)

    def says(self, *command: str | Path) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The locked dependencies, linked from uv's cache, and the wheel; removed at the end, for it is many files."""
    folder = tmp_path_factory.mktemp("wheel")
    venv, home = folder / "venv", folder / "home"
    home.mkdir()
    env = ground.uv_environment(folder)

    def uv(*words: str | Path) -> None:
        done = subprocess.run([ground.uv(), *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    uv("build", "--quiet", "--wheel", "--no-build-isolation", f"--python={sys.executable}", "-o", folder, PROJECT)
    (wheel,) = folder.glob("*.whl")
    uv("venv", "--quiet", "--no-project", f"--python={sys.executable}", venv)
    target = f"--python={venv}/bin/python"
    uv("pip", "sync", "--quiet", target, "--require-hashes", ground.REQUIREMENTS / "control.txt")
    uv("pip", "install", "--quiet", target, "--no-deps", wheel)
    uv("pip", "check", "--quiet", target)
    yield Installed(wheel, venv, home)
    shutil.rmtree(venv)


def test_the_wheel_holds_what_git_holds_of_the_collection_and_nothing_else(installed: Installed) -> None:
    parts = ["galaxy.yml", "meta", "playbooks", "plugins", "roles"]
    listed = subprocess.run(
        ["git", "ls-files", "-z", *parts], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    # The probes are linked into a role; a wheel knows no links and holds them twice.
    probes = "roles/node_health/files/health"
    wanted = {name for name in listed if name and name != probes}
    wanted |= {f"{probes}/{path.name}" for path in (PROJECT / "src/gpuyard/health").glob("*.py")}
    inside = "ansible_collections/gpuyard/fleet/"
    names = [name.removeprefix(inside) for name in zipfile.ZipFile(installed.wheel).namelist() if inside in name]
    assert {name for name in names if name.split("/")[0] in parts} == wanted


def test_engines_are_installed_from_the_very_requirements_that_were_locked(installed: Installed) -> None:
    rows = yaml.safe_load((PROJECT / "src/gpuyard/catalog/engines.yaml").read_text())
    named = {row["requirements"] for row in rows if row["requirements"]}
    assert len(named) >= 2
    with zipfile.ZipFile(installed.wheel) as wheel:
        for name in {*named, "requirements/bootstrap.txt"}:
            assert wheel.read(f"ansible_collections/gpuyard/fleet/{name}") == (PROJECT / name).read_bytes()


def test_the_command_checks_a_fleet(installed: Installed) -> None:
    shutil.copy(PROJECT / "fleets/lab.yaml", installed.home / "lab.yaml")
    told = json.loads(installed.says("gpuyard", "check", "lab.yaml", "--json"))
    assert told["verdict"] == "amber"
    assert "PLAN-REQUIREMENTS" in [finding["rule"] for finding in told["findings"]], "there is no project around it"
    where = "import gpuyard; print(gpuyard.__file__)"
    assert installed.says("python", "-c", where).startswith(str(installed.venv))


def test_ansible_documents_every_role_and_the_inventory(installed: Installed) -> None:
    listed = json.loads(installed.says("ansible-doc", "-t", "role", "-l", "--json", "gpuyard.fleet"))
    assert sorted(name.removeprefix("gpuyard.fleet.") for name in listed) == ROLES
    told = json.loads(installed.says("ansible-doc", "-t", "inventory", "--json", "gpuyard.fleet.pulumi"))
    doc = told["gpuyard.fleet.pulumi"]["doc"]
    assert "Nodes of a gpuyard fleet" in doc["short_description"]
    assert doc["filename"].startswith(str(installed.venv))


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_ansible_can_parse_every_playbook_by_its_name(installed: Installed, playbook: str) -> None:
    installed.says("ansible-playbook", "--syntax-check", "--inventory=localhost,", playbook)


def test_a_role_runs_with_its_modules_and_refuses_with_its_rules(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store")
    variables = {
        "model_store_models": [
            {"name": "tiny", "uri": store.uri, "manifest_sha256": store.put("tiny", MODEL_FILES)},
        ],
        "model_store_root": str(tmp_path / "models"),
        "model_store_helpers": str(tmp_path / "helpers"),
    }
    role = [{"ansible.builtin.include_role": {"name": "gpuyard.fleet.model_store"}, "name": "Store"}]
    play = installed.home / "play.yml"
    play.write_text(json.dumps([{"name": "Play", "hosts": "localhost", "gather_facts": False, "tasks": role}]))
    # Files of a node belong to root: who is not root here can see only what would be done.
    check = [] if os.geteuid() == 0 else ["--check"]
    local = ["ansible-playbook", "--inventory=localhost,", "--connection=local", *check, str(play), "-e"]
    done = installed.says(*local, json.dumps(variables))
    store.server.shutdown()
    assert "failed=0" in done
    if not check:
        stored = tmp_path / "models/tiny" / variables["model_store_models"][0]["manifest_sha256"][:12]
        assert (stored / "config.json").read_text() == MODEL_FILES["config.json"]
        assert (tmp_path / "helpers/model_verify.py").is_file()
        assert "changed=0" in installed.says(*local, json.dumps(variables))
    refused = installed.run(*local, json.dumps({**variables, "model_store_keep": 1}))
    assert refused.returncode != 0
    assert "MODEL-KEEP" in refused.stdout
