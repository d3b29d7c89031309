"""The signed repository on the disk, read by gpg's and apt's own tools."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from gpuyard.lab import mirror, nvml
from gpuyard.lab.models import LabRef
from gpuyard.lab.packages import dkms_source, recipes
from gpuyard.lab.place import Place

from .conftest import refused


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("mirror")
    place = Place(LabRef(project=root / "project", stack="lab"), root / "cache")
    place.state.mkdir(parents=True)
    # The repository is made of packages; what is inside them is no matter of apt's.
    parts = place.cache / "lab" / f"nvml-{nvml.digest()}"
    parts.mkdir(parents=True)
    for name in (nvml.LIBRARY, nvml.SMI):
        (parts / name).write_text(name)
    mirror.build(place)
    return place


class Apt:
    """apt as a node would use it, in folders of its own and as far as the resolver goes."""

    def __init__(self, root: Path, repository: Path, key: str) -> None:
        for folder in ("etc/preferences.d", "etc/apt.conf.d", "etc/trusted.gpg.d", "state/lists/partial", "cache"):
            (root / folder).mkdir(parents=True)
        (root / "status").write_text(
            "Package: python3\nStatus: install ok installed\nArchitecture: amd64\nMaintainer: a\nVersion: 3.11\n"
            "Description: a\n"
        )
        (root / "key.asc").write_text(key)
        (root / "etc/sources.list").write_text(f"deb [signed-by={root}/key.asc] file:{repository} /\n")
        self.options = [
            f"-oDir::Etc={root}/etc",
            f"-oDir::State={root}/state",
            f"-oDir::State::status={root}/status",
            f"-oDir::Cache={root}/cache",
            "-oAPT::Architecture=amd64",
            "-oAPT::Architectures=amd64",
            "-oAPT::Sandbox::User=root",
        ]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LC_ALL": "C", "APT_CONFIG": "/dev/null"}
        return subprocess.run(
            ["apt-get", *self.options, *words], capture_output=True, text=True, check=False, env=environment
        )

    def would_install(self, *words: str) -> set[str]:
        done = self.run("-s", "install", *words)
        assert done.returncode == 0, done.stderr
        return {f"{name}={version}" for name, version in re.findall(r"^Inst (\S+) \((\S+)", done.stdout, re.MULTILINE)}


@pytest.fixture
def apt(place: Place, tmp_path: Path) -> Apt:
    apt = Apt(tmp_path, place.apt, mirror.access(place, "").key)
    done = apt.run("update", "--error-on=any")
    assert done.returncode == 0, done.stderr
    return apt


def test_there_are_four_versions_over_two_branches_and_every_name_is_the_vendors() -> None:
    built = {(package.name, package.version) for package in recipes.packages()}
    assert len({version for name, version in built if name == "nvidia-driver-cuda"}) == 4
    assert {name for name, _ in built if "pinning" in name} == {
        "nvidia-driver-pinning-580",
        "nvidia-driver-pinning-590",
    }


def test_the_signature_is_good_for_this_labs_key_and_covers_the_list(place: Place, tmp_path: Path) -> None:
    access = mirror.access(place, "http://x/nvidia")
    (tmp_path / "key.asc").write_text(access.key)
    keyring = tmp_path / "key.gpg"
    subprocess.run(["gpg", "--dearmor", "-o", keyring, tmp_path / "key.asc"], check=True, capture_output=True)
    done = subprocess.run(
        ["gpgv", "--status-fd=1", "--keyring", keyring, place.apt / "InRelease"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"VALIDSIG {access.fingerprint}" in done.stdout
    data = (place.apt / "Packages").read_bytes()
    assert f" {hashlib.sha256(data).hexdigest()} {len(data)} Packages\n" in (place.apt / "InRelease").read_text()


def test_a_driver_brings_its_own_library_and_kernel_modules(apt: Apt) -> None:
    version = "580.126.20-1"
    chosen = apt.would_install(
        f"nvidia-driver-cuda={version}", f"libnvidia-ml1={version}", f"nvidia-kernel-dkms={version}"
    )
    assert chosen == {f"{name}={version}" for name in ("nvidia-driver-cuda", "libnvidia-ml1", "nvidia-kernel-dkms")}


def test_a_driver_with_the_library_of_another_version_is_refused(apt: Apt) -> None:
    done = apt.run("-s", "install", "nvidia-driver-cuda=580.126.20-1", "libnvidia-ml1=580.105.08-1")
    assert done.returncode == 100
    assert "nvidia-driver-cuda : Depends: libnvidia-ml1 (= 580.126.20-1)" in done.stdout


def test_the_two_kernel_flavours_exclude_each_other(apt: Apt) -> None:
    done = apt.run("-s", "install", "nvidia-kernel-dkms=580.126.20-1", "nvidia-kernel-open-dkms=580.126.20-1")
    assert done.returncode == 100
    assert "Conflicts" in done.stdout


def test_the_two_pinning_packages_exclude_each_other(apt: Apt) -> None:
    assert apt.run("-s", "install", "nvidia-driver-pinning-580", "nvidia-driver-pinning-590").returncode == 100


def test_the_pinning_package_keeps_the_driver_on_its_branch(apt: Apt, place: Place, tmp_path: Path) -> None:
    assert "libnvidia-ml1=590.48.01-1" in apt.would_install("libnvidia-ml1")
    deb = next(place.apt.glob("nvidia-driver-pinning-580_*.deb"))
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path / "pin"], check=True)
    (tmp_path / "pin/etc/apt/preferences.d/nvidia-driver-pinning").rename(tmp_path / "etc/preferences.d/pin")
    assert apt.would_install("libnvidia-ml1") == {"libnvidia-ml1=580.126.20-1"}


def test_a_repository_signed_with_another_key_is_refused(place: Place, tmp_path: Path) -> None:
    other = Place(LabRef(project=tmp_path / "other", stack="lab"), place.cache)
    other.state.mkdir(parents=True)
    mirror.build(other)
    done = Apt(tmp_path / "apt", place.apt, mirror.access(other, "").key).run("update", "--error-on=any")
    assert done.returncode == 100
    assert "NO_PUBKEY" in done.stderr


def test_a_list_that_was_changed_after_signing_is_refused(place: Place, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in place.apt.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "Packages.gz").unlink()
    with (changed / "Packages").open("a") as packages:
        packages.write("\nPackage: intruder\nVersion: 1\n")
    done = Apt(tmp_path / "apt", changed, mirror.access(place, "").key).run("update", "--error-on=any")
    assert done.returncode == 100


def test_building_again_changes_nothing_and_another_recipe_keeps_the_key(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in place.apt.iterdir()}
    mirror.build(place)
    assert {path.name: path.stat().st_mtime_ns for path in place.apt.iterdir()} == before
    key = mirror.access(place, "").key
    monkeypatch.setattr(mirror, "recipe_digest", lambda: "another")
    assert not mirror.whole(place)
    mirror.build(place)
    assert mirror.whole(place)
    assert mirror.access(place, "").key == key


def test_the_secret_key_is_for_its_owner_alone(place: Place) -> None:
    assert (place.state / "apt-key/secret.asc").stat().st_mode & 0o077 == 0


def test_the_library_and_nvidia_smi_are_in_the_packages_under_the_drivers_names(place: Place, tmp_path: Path) -> None:
    for name, path, content in (
        ("libnvidia-ml1", "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.126.20", nvml.LIBRARY),
        ("nvidia-driver-cuda", "usr/bin/nvidia-smi", nvml.SMI),
    ):
        deb = next(place.apt.glob(f"{name}_580.126.20-1_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, tmp_path / name], check=True)
        assert (tmp_path / name / path).read_text() == content
        assert (tmp_path / name / path).stat().st_mode & 0o777 == 0o755


def test_without_what_set_up_makes_there_are_no_packages(tmp_path: Path) -> None:
    bare = Place(LabRef(project=tmp_path / "project", stack="lab"), tmp_path / "cache")
    bare.state.mkdir(parents=True)
    with refused("LAB-NVML") as said:
        mirror.build(bare)
    assert "run `make setup`" in str(said.value)


@pytest.mark.parametrize("told", [False, True])
def test_a_kernel_module_is_built_by_dkms_only_where_a_node_is_told_what_that_costs(tmp_path: Path, told: bool) -> None:
    cost, asked = tmp_path / "compile_seconds", tmp_path / "asked"
    if told:
        cost.write_text("60")
    (dkms := tmp_path / "dkms").write_text(f'#!/bin/sh\necho dkms "$@" | tee -a {asked}\n')
    (common := tmp_path / "common.postinst").write_text(f'#!/bin/sh\necho postinst "$@" >>{asked}\n')
    for program in (dkms, common):
        program.chmod(0o755)
    package = next(package for package in recipes.packages() if package.name == "nvidia-kernel-open-dkms")
    version = package.version.removesuffix(f"-{recipes.REVISION}")
    own = ["nvidia", version, "/usr/share/nvidia-dkms"]
    words = ["-m", "nvidia", "-v", version, "--all"]
    for script, word in ((package.postinst, "configure"), (package.prerm, "upgrade")):
        script = script.replace(dkms_source.COST, str(cost)).replace("/usr/lib/dkms/common.postinst", str(common))
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        subprocess.run(["sh", "-ec", script, "-", word], check=True, env=environment, timeout=60)
    said = [line.split() for line in asked.read_text().splitlines()] if asked.exists() else []
    assert said == ([["postinst", *own], ["dkms", "status", *words[:4]], ["dkms", "remove", *words]] if told else [])
