"""Where things are, who may become root, and the small tools all steps use."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from steps.stepper import NeedsRootError, SetupError

PROJECT = Path(__file__).resolve().parents[2]
REQUIREMENTS = PROJECT / "requirements"

PYTHON_INDEX = "a Python package index"
DEBIAN_ARCHIVE = "a Debian package archive"

# The settings by which a user names a proxy or a mirror: they reach into the nodes' base system and through sudo.
WAYS_OUT = re.compile(r"(https?|all|no)_proxy|UV_(DEFAULT_)?INDEX\w*|UV_EXTRA_INDEX_URL|UV_HTTP_TIMEOUT", re.IGNORECASE)


def cache() -> Path:
    if named := os.environ.get("GPUYARD_CACHE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuyard"


def state() -> Path:
    return PROJECT / ".gpuyard"


def locked(requirements: str, package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==([\w.]+)", (REQUIREMENTS / requirements).read_text(), re.MULTILINE)
    if not found:
        raise SetupError("SETUP-LOCK", f"requirements/{requirements} does not lock {package}; run `make lock-python`")
    return found[1]


def uv() -> Path:
    return cache() / f"uv-{locked('bootstrap.txt', 'uv')}" / "bin" / "uv"


def uv_environment(beside: Path | None = None) -> dict[str, str]:
    env = {
        **{name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")},
        "UV_CACHE_DIR": str(cache() / "uv"),
        "UV_NO_PROGRESS": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_PYTHON_INSTALL_DIR": str(cache() / "python"),
        # The machine's own list: a company's mirror is signed by a company's authority.
        "UV_SYSTEM_CERTS": "1",
    }
    if beside is not None and cache().stat().st_dev != beside.stat().st_dev:
        env["UV_LINK_MODE"] = "copy"
    return with_pip_index(env)


def with_pip_index(env: dict[str, str]) -> dict[str, str]:
    """uv does not read pip's setting; who set one mirror does not want to be asked twice."""
    if "PIP_INDEX_URL" in os.environ:
        env.setdefault("UV_DEFAULT_INDEX", os.environ["PIP_INDEX_URL"])
    return env


# --- root's rights -----------------------------------------------------------------------------------------------


@functools.cache
def way_to_root() -> tuple[str, ...] | None:
    """What to put before a command that needs root, or None where nobody lets us."""
    if os.geteuid() == 0:
        return ()
    if shutil.which("sudo") and answers(["sudo", "-n", "true"]) is not None:
        return ("sudo", "-n")
    return None


def as_root(command: Sequence[str | Path], by_hand: str, why: str) -> list[str | Path]:
    way = way_to_root()
    if way is None:
        raise NeedsRootError(
            "SETUP-ROOT", f"{why}, and this is neither root nor allowed to become it without a password; run: {by_hand}"
        )
    if not way:
        return list(command)
    kept = ",".join(name for name in os.environ if WAYS_OUT.fullmatch(name))
    return [*way, *([f"--preserve-env={kept}"] if kept else []), *command]


def nodes_by_hand() -> str:
    """One line for all that is built as root, so that nobody has to come back for the next."""
    program = shlex.quote(str(PROJECT / "tools/setup"))
    steps = "root nvml engine locked-engines engine-sim model vm"
    return f"sudo env GPUYARD_CACHE={shlex.quote(str(cache()))} {program} {steps}"


# --- small tools -------------------------------------------------------------------------------------------------


def answers(command: Sequence[str | Path]) -> str | None:
    """What a program prints, or None where it does not work."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def numbers(text: str) -> tuple[int, ...]:
    """A version as what it compares by: (1, 26, 8) of `go1.26.8`."""
    return tuple(map(int, re.findall(r"\d+", text)))


def digest_of(*files: Path) -> str:
    """The SHA-256 of one file as sha256sum prints it; of several, of those of each."""
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def put(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole or not at all, and never readable by more than `mode` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    partial.chmod(mode)
    partial.rename(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
