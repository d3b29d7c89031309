"""The machine and the control side: Debian packages, uv, Python, the virtual environment, this clone's state."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from steps.ground import (
    PROJECT,
    REQUIREMENTS,
    answers,
    as_root,
    cache,
    digest_of,
    locked,
    numbers,
    put,
    remove,
    state,
    uv,
    uv_environment,
)
from steps.stepper import NeedsRootError, SetupError, Work

# Debian and Ubuntu package: what to look for where there is no dpkg to ask.
PACKAGES = {
    "apt-utils": "apt-ftparchive",
    "ca-certificates": "update-ca-certificates",
    "curl": "curl",
    "debian-archive-keyring": "",
    "git": "git",
    "gnupg": "gpg",
    "iproute2": "ip",
    "mmdebstrap": "mmdebstrap",
    "nftables": "nft",
    "openssh-client": "ssh",
    "python3-venv": "",
    "systemd-container": "systemd-nspawn",
}
QEMU_PACKAGES = {"qemu-system-x86": "qemu-system-x86_64", "qemu-utils": "qemu-img"}
# The smallest of Debian's browsers that draws a page as a person's would; a font, for it brings none.
BROWSER_PACKAGES = {"chromium-headless-shell": "chromium-headless-shell", "fonts-dejavu-core": ""}

PYTHON_OLDEST = (3, 12)


# --- debs: what the lab needs of the machine itself --------------------------------------------------------------


def debs_ready(packages: Mapping[str, str] = PACKAGES) -> str | None:
    missing = missing_packages(packages)
    return None if missing else f"{len(packages)} packages"


def missing_packages(packages: Mapping[str, str] = PACKAGES) -> list[str]:
    if not shutil.which("dpkg-query"):
        return sorted(package for package, program in packages.items() if program and not shutil.which(program))
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Package}\n", *packages]
    said = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout
    installed = {line.split()[1] for line in said.splitlines() if line.startswith("installed ")}
    return sorted(set(packages) - installed)


def make_debs(work: Work, packages: Mapping[str, str] = PACKAGES) -> str:
    missing = missing_packages(packages)
    if not shutil.which("apt-get"):
        raise SetupError(
            "SETUP-OS",
            f"this machine has no apt, so what is missing cannot be installed for you: {', '.join(missing)} "
            "(Debian's names); install their equivalents, or use Debian or Ubuntu",
        )
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    by_hand = f"sudo apt-get update && sudo {' '.join(install)}"
    why = f"the packages {', '.join(missing)} are missing"
    # A service that a package starts must not be taken for a part of this set-up that still runs.
    work.held = ()
    with_fresh_lists(work, as_root(["env", "DEBIAN_FRONTEND=noninteractive", *apt(*install[1:])], by_hand, why), why)
    if still := missing_packages(packages):
        raise SetupError("SETUP-DEBS", f"apt installed without an error, and {', '.join(still)} are still missing")
    return f"installed {', '.join(missing)}"


def apt(*words: str) -> list[str]:
    return ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", *words]


def with_fresh_lists(work: Work, command: Sequence[str | Path], why: str) -> None:
    """Run apt; where it fails, because the lists of packages are missing or old, bring them and run it again."""
    try:
        work.run(command)
    except SetupError:
        # Whether the archive answered, the second run says: another one in the sources may be broken for long.
        try:
            work.run(as_root(apt("update"), "sudo apt-get update", why))
        except NeedsRootError:
            raise
        except SetupError as refusal:
            work.log.open("a").write(f"{refusal}\n")
        work.run(command)


# --- haproxy: what tests of the gateway's configuration run; unpacked, so that no service of it comes up here ----

HAPROXY_WRAPPER = """\
#!/bin/sh
home=$(dirname "$(dirname "$(readlink -f "$0")")")
LD_LIBRARY_PATH=$(printf '%s:' "$home"/tree/usr/lib/*-linux-gnu "$home"/tree/lib/*-linux-gnu)
export LD_LIBRARY_PATH
exec "$home/tree/usr/sbin/haproxy" "$@"
"""


def haproxy() -> Path:
    return cache() / "haproxy/bin/haproxy"


def haproxy_ready() -> str | None:
    installed = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if installed:
        return installed
    return str(haproxy()) if answers([haproxy(), "-v"]) else None


def make_haproxy(work: Work) -> str:
    home = haproxy().parent.parent
    partial = home.with_name(f"{home.name}.partial")
    remove(partial)
    for folder in ("bin", "tree", "archives/partial"):
        (partial / folder).mkdir(parents=True)
    # As a user: nothing of the machine's own package state is written, so its lock is not needed either.
    mine = ["-o", "Debug::NoLocking=1", "-o", f"Dir::Cache::archives={partial / 'archives'}", "--download-only"]
    why = "the tests of the gateway's configuration run HAProxy"
    with_fresh_lists(work, apt(*mine, "install", "--yes", "--no-install-recommends", "haproxy"), why)
    for package in sorted((partial / "archives").glob("*.deb")):
        work.run(["dpkg-deb", "--extract", package, partial / "tree"])
    put(partial / "bin/haproxy", HAPROXY_WRAPPER.encode(), 0o755)
    remove(partial / "archives")
    remove(home)
    partial.rename(home)
    if haproxy_ready() is None:
        raise SetupError("SETUP-HAPROXY", f"{haproxy()} does not run; see {work.log}")
    return str(haproxy())


# --- uv, Python, and the control side's environment --------------------------------------------------------------


def uv_ready() -> str | None:
    return f"uv {locked('bootstrap.txt', 'uv')}" if uv().is_file() else None


def make_uv(work: Work) -> str:
    home = uv().parent.parent
    partial = home.with_name(f"{home.name}.partial")
    remove(partial)
    work.run([sys.executable, "-m", "venv", partial])
    pip = [partial / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    work.run([*pip, "--require-hashes", "--no-deps", "--only-binary=:all:", "-r", REQUIREMENTS / "bootstrap.txt"])
    remove(home)
    partial.rename(home)
    return f"uv {locked('bootstrap.txt', 'uv')}"


def python_ready() -> str | None:
    found = find_python(python_candidates(os.environ.get("PATH", ""), Path.home()))
    return str(found) if found else None


def python_candidates(path: str, home: Path) -> Iterable[Path]:
    """Wherever a Python may be, best first: the project's own, PATH, pyenv's versions, what uv fetched before."""
    yield PROJECT / ".venv/bin/python"
    names = ("python3.12", "python3.13", "python3.14", "python3", "python")
    folders = [Path(entry) for entry in path.split(os.pathsep) if entry]
    yield from (folder / name for name in names for folder in folders)
    for versions in (home / ".pyenv/versions", cache() / "python"):
        yield from sorted(versions.glob("*/bin/python3"), key=lambda found: numbers(found.parent.parent.name))


def find_python(candidates: Iterable[Path]) -> Path | None:
    """The first that runs and is new enough. Being there is not enough: a pyenv shim may stand for nothing."""
    question = "import sys; print(*sys.version_info[:2], getattr(sys, '_base_executable', '') or sys.executable)"
    for candidate in candidates:
        if not os.access(candidate, os.X_OK):
            continue
        said = answers([candidate, "-I", "-c", question])
        if said and tuple(map(int, said.split(" ", 2)[:2])) >= PYTHON_OLDEST:
            return Path(said.split(" ", 2)[2])
    return None


def make_python(work: Work) -> str:
    env = {**uv_environment(), "UV_PYTHON_DOWNLOADS": "automatic"}
    work.run([uv(), "python", "install", "--no-bin", ".".join(map(str, PYTHON_OLDEST))], env=env)
    found = python_ready()
    if found is None:
        raise SetupError(
            "SETUP-PYTHON", f"uv installed a Python into {cache() / 'python'} that does not run; see {work.log}"
        )
    return found


def venv_recipe() -> str:
    return digest_of(REQUIREMENTS / "control.txt", PROJECT / "pyproject.toml")


def venv_ready() -> str | None:
    stamp = PROJECT / ".venv/.gpuyard"
    stands = stamp.is_file() and stamp.read_text() == venv_recipe()
    python = find_python([PROJECT / ".venv/bin/python"]) if stands else None
    return str(PROJECT / ".venv") if python else None


def make_venv(work: Work) -> str:
    venv = PROJECT / ".venv"
    env = uv_environment(PROJECT)
    if find_python([venv / "bin/python"]) is None:
        work.run([uv(), "venv", "--clear", "--no-project", "--python", python_ready() or "python3", venv], env=env)
    pip = [uv(), "pip"]
    target = ["--python", venv / "bin/python"]
    # Compiled once here: where Python may not write what it compiled, each command would compile all it imports anew.
    work.run([*pip, "sync", *target, "--compile-bytecode", "--require-hashes", REQUIREMENTS / "control.txt"], env=env)
    # What builds the project is in the lock too: nothing is fetched for it that is not pinned.
    work.run([*pip, "install", *target, "--no-deps", "--no-build-isolation", "--editable", PROJECT], env=env)
    (venv / ".gpuyard").write_text(venv_recipe())
    return str(venv)


# --- state: what belongs to this clone ---------------------------------------------------------------------------


def state_ready() -> str | None:
    whole = all(folder.is_dir() and folder.stat().st_mode & 0o077 == 0 for folder in state_folders())
    return str(state()) if whole and (state() / "passphrase").is_file() else None


def state_folders() -> list[Path]:
    return [state(), state() / "pulumi", state() / "secrets"]


def make_state(_: Work) -> str:
    passphrase = state() / "passphrase"
    if not passphrase.exists() and any((state() / "pulumi").glob(".pulumi/stacks/**/*.json")):
        raise SetupError(
            "SETUP-PASSPHRASE",
            f"{state() / 'pulumi'} holds stacks and {passphrase} that opens their secrets is gone; put it back, or "
            "give the stacks up: gpuyard lab down, then remove that folder",
        )
    for folder in state_folders():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    if not passphrase.exists():
        put(passphrase, f"{secrets.token_hex(32)}\n".encode(), 0o600)
    return str(state())
